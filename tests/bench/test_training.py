"""The questions about training train, measure, and say what could not be measured."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import apart
from bench.apart import in_a_process
from bench.questions import (
    LEVELS,
    NEEDS_GPU,
    NOT_INSTALLED,
    OURS,
    OUT_OF_MEMORY,
    Rates,
    Row,
    Settings,
)
from bench.training import QUESTIONS, backbones, implementations, steps
from bench.training.backbones import BACKBONES, config_of, skeleton, training_flops
from bench.training.corpus import batches, corpus_of, model_of, texts_of
from bench.training.implementations import (
    Measured,
    Memory,
    Task,
    measure,
    one_graph,
    rankpo_fast,
    rankpo_fast_adapters,
)
from bench.training.steps import answer, compare, ladder, rows_of, task_of
from rankpo_fast.errors import InputError

ROWS = 160  # of the smallest corpus
SHAPE = {"batch": 16, "negatives": 1, "steps": 3, "backbone": "tiny"}
SETTINGS = Settings("cpu", "quick", 7, Rates({"float32": 1e10, "bfloat16": 4e10}, 1e10))
HANGS_S = 60
ON_GPU = dataclasses.replace(SETTINGS, device="cuda")


def test_texts_repeat_only_where_they_may():
    distinct, repeated = (corpus_of(ROWS, repeating)[1] for repeating in (False, True))
    texts = [text for row in distinct for text in texts_of(row)]
    assert len(set(texts)) == len(texts) == 3 * ROWS
    model = model_of("tiny", ROWS)
    assert batches(repeated, model, 16, 1, seed=0).about["repeated texts"] > 0.1
    about = batches(distinct, model, 16, 1, seed=0).about
    assert about["repeated texts"] == 0 and 0.3 < about["padding"] < 0.8


def test_a_batch_of_one_length_has_no_padding_and_costs_what_its_distinct_texts_do():
    row = corpus_of(ROWS, False)[1][0] | {"negatives": []}
    model = model_of("tiny", ROWS)
    same, one = batches([row] * 4, model, 4, 0, seed=0), batches([row], model, 1, 0, seed=0)
    assert same.about["padding"] == 0 and same.about["repeated texts"] == 6 / 8
    assert same.tokens == 4 * one.tokens and same.flops == one.flops


def test_tokens_are_those_of_texts_and_not_of_padding():
    rows, model = corpus_of(ROWS, False)[1][:8], model_of("tiny", ROWS)
    together = batches(rows, model, 8, 0, seed=0)
    alone = [batches([row], model, 1, 0, seed=0) for row in rows]  # where there is no padding
    assert together.about["padding"] > 0.1 and not any(one.about["padding"] for one in alone)
    assert together.tokens == pytest.approx(sum(one.tokens for one in alone))


# --- backbones ---


@pytest.mark.parametrize(
    ("backbone", "millions"),
    [("MiniLM-L6", 22.7), ("bge-base", 109), ("Qwen3-0.6B", 596), ("Llama-3.2-1B", 1236),
     ("Llama-3.2-3B", 3213), ("Qwen3-4B", 4022), ("Llama-3.1-8B", 8030)],
)  # fmt: skip
def test_a_backbone_has_the_published_number_of_parameters(backbone, millions):
    config = config_of(backbone)
    count = sum(parameter.numel() for parameter in skeleton(config).parameters())
    if not config.tie_word_embeddings:  # the head, which an encoder does without
        count += config.vocab_size * config.hidden_size
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("kind", ["bert", "qwen3"], ids=["both-sides", "causal-grouped-heads"])
def test_useful_flops_are_those_that_torch_counts(kind):
    """Of one forward and backward over texts of one length, where there is no padding."""
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}  # fmt: skip
    if kind == "bert":
        del sizes["head_dim"], sizes["num_key_value_heads"]
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="eager")
        ids = torch.zeros(5, 37, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).last_hidden_state.sum().backward()
    pooler = 2 * 5 * 48 * 48 if kind == "bert" else 0  # forward alone, of a token a text
    counted = counter.get_total_flops() - pooler
    assert training_flops(config, torch.full((5,), 37)) == pytest.approx(counted, rel=1e-9)


def test_a_backbone_trains_from_its_config_alone(monkeypatch):
    pytest.importorskip("sentence_transformers")
    small = BACKBONES["Qwen3-0.6B"] | backbones._size(32, 64, 2, 4) | {"head_dim": 8}
    monkeypatch.setitem(BACKBONES, "small", small | {"vocab_size": 4096, "num_key_value_heads": 2})
    shape = SHAPE | {"backbone": "small", "steps": 2}
    rows = answer("backbones", "?", steps._against, shape, SETTINGS).rows
    assert not (model_of("small", ROWS) / "model.safetensors").exists()
    assert all(not row.note and row.peak_mib > 1 and row.seconds > 0 for row in rows)


def test_ours_may_lack_memory_only_for_a_model_that_cannot_fit(monkeypatch):
    lacking, fine = Row(OURS, OUT_OF_MEMORY), Row(OURS, "ValueError: no")
    needed = 16 * 22.7e6
    for there, red in ((2 * needed, True), (needed / 2, False)):
        monkeypatch.setattr(steps, "_memory_bytes", lambda device, there=there: there)
        said = steps._excused(lacking, config_of("MiniLM-L6"), "cuda")
        assert said.red == red and OUT_OF_MEMORY in said.note
        assert steps._excused(fine, config_of("MiniLM-L6"), "cuda") == fine


# --- a process each ---


def raising(error: BaseException, task: Task) -> None:
    raise error


def hanging(in_a_thread: bool) -> str:
    if in_a_thread:
        threading.Thread(target=time.sleep, args=(HANGS_S,)).start()
    else:
        time.sleep(HANGS_S)
    return "answer"


def dying(task: Task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def task(tmp_path) -> Task:
    return dataclasses.replace(task_of(SHAPE, "cpu"), output=tmp_path / "output")


@pytest.mark.parametrize(
    ("implementation", "note"),
    [
        (partial(raising, ValueError("no\nmore")), "ValueError: no"),
        (partial(raising, torch.OutOfMemoryError()), OUT_OF_MEMORY),
        (partial(raising, ModuleNotFoundError(name="datasets")), f"datasets {NOT_INSTALLED}"),
        (dying, OUT_OF_MEMORY),
    ],
    ids=["error", "torch-out-of-memory", "not-installed", "killed-as-the-kernel-does"],
)
def test_what_stops_an_implementation_is_its_answer(task, implementation, note):
    assert in_a_process(measure, implementation, task) == note


@pytest.mark.parametrize("thread", [False, True], ids=["answer", "end"])
def test_a_process_that_hangs_holds_nobody_up(task, monkeypatch, thread):
    """Before its answer, or after it, in a thread that Python waits for."""
    monkeypatch.setattr(apart, "ANSWER_S", 10 if thread else 0.5)
    monkeypatch.setattr(apart, "END_S", 0.5)
    start = time.perf_counter()
    said = in_a_process(hanging, thread)
    assert said == ("answer" if thread else "no answer within 0.5 s")
    assert time.perf_counter() - start < HANGS_S


UNTOUCHED = """
import importlib, os, sys
os.environ.update({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"})
import torch, torch._inductor
touched = lambda *_, **__: sys.exit("touched")
torch.cuda._is_compiled, torch.cuda._device_count_nvml = lambda: True, lambda: 1
torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = touched
import bench.preload
assert torch.cuda.is_available() and "transformers.models.llama.modeling_llama" in sys.modules
assert not {"torchao", "bitsandbytes"} & sys.modules.keys()  # and can be had all the same
"""


@pytest.mark.long
def test_the_server_of_processes_does_not_touch_the_gpu():
    """One forked from it could not use the GPU then; torch is told here that there is one."""
    command = [sys.executable, "-c", UNTOUCHED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_step_takes_what_it_does_once_training_has_settled(task, monkeypatch):
    """Of eight the first two, which compile and try, are in no figure."""
    clock = []
    monkeypatch.setattr(implementations, "perf_counter", lambda: sum(clock))

    def trains(task):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters())
        for step in range(task.steps):
            clock.append(9.0 if step < 2 else 1.0)
            model(torch.ones(2)).sum().backward()
            optimizer.step()

    said = measure(trains, dataclasses.replace(task, steps=8))
    assert (said.seconds, said.counted) == (1.0, 6)


# --- rows ---


@pytest.mark.long
def test_a_rung_that_raises_is_a_row_and_the_rest_goes_on():
    """And each rung's product is counted at the rate of its own dtype."""

    def rungs(shape, settings):
        return {
            "one graph": partial(one_graph, bf16=True),
            "absent": NEEDS_GPU,
            "raises": partial(raising, ValueError("no")),
            OURS: partial(rankpo_fast),
        }

    result = answer("ladder", "?", rungs, SHAPE, SETTINGS)
    first, absent, raises, ours = result.rows
    assert (absent.note, raises.note, ours.note) == (NEEDS_GPU, "ValueError: no", "")
    assert [row.red for row in result.rows] == [False, False, True, False]
    assert first.ratio == 1 and ours.ratio == pytest.approx(ours.seconds / first.seconds)
    for row, rate in ((first, 4e10), (ours, 1e10)):
        assert row.mfu == pytest.approx(result.flops / row.seconds / rate)
        assert row.queries == pytest.approx(16 / row.seconds) and row.peak_mib > 0
        assert row.tokens == pytest.approx(row.queries * result.about["tokens of a row"])
        assert row.ndcg is None and row.joules is None


@pytest.mark.long
def test_what_was_learnt_is_measured_of_the_directory_that_was_left():
    pytest.importorskip("sentence_transformers")
    result = answer("learning", "?", steps._against, SHAPE, SETTINGS)
    assert [row.implementation for row in result.rows] == ["sentence-transformers", OURS]
    learnt = [result.about["untrained ndcg"], *(row.ndcg for row in result.rows)]
    assert all(0 < ndcg < 1 for ndcg in learnt) and len(set(learnt)) == 3


def test_joules_are_per_million_tokens(monkeypatch):
    given = [Measured(0.5, 10, 2**20, watts=300.0, joules=50.0, throttled="hot")]
    monkeypatch.setattr(steps, "compare", lambda *_: {OURS: given})
    [row] = answer("padding", "?", lambda *_: {OURS: partial(rankpo_fast)}, SHAPE, SETTINGS).rows
    assert row.joules == pytest.approx(50 / (10 * row.tokens * 0.5) * 1e6)
    assert (row.watts, row.throttled) == (300, "hot")


def test_ratios_are_taken_within_a_round():
    first = [Measured(seconds, 1, 2**20, 0.5) for seconds in (1.0, 2.0, 10.0)]  # it grows busy
    ours = [Measured(s, 1, 2**21, n) for s, n in ((0.5, 0.4), (0.8, 0.5), (5.0, 0.6))]
    row = rows_of({"first": first, OURS: ours}, lambda *_: {})[1]
    assert (row.ratio, row.ratio_low, row.ratio_high) == (0.5, 0.4, 0.5)
    assert row.ratios == (0.5, 0.4, 0.5)
    assert (row.seconds, row.low, row.high, row.peak_mib) == (0.8, 0.5, 5.0, 2.0)
    assert (row.ndcg, row.ndcg_low, row.ndcg_high) == (pytest.approx(0.5), 0.4, 0.6)


def test_an_implementation_that_failed_in_one_round_has_no_time():
    fine, note = Measured(1.0, 1, 1), "ValueError: no"
    for given in ([note, fine], [fine, note]):
        _, row = rows_of({"first": [fine, fine], OURS: given}, lambda *_: {})
        assert (row.note, row.seconds, row.ratio) == (note, None, None) and row.red


def test_one_throttled_round_marks_the_row():
    cool, hot = Measured(1.0, 1, 1), Measured(1.0, 1, 1, throttled="power cap")
    for given in ([cool, hot], [hot, cool]):
        (row,) = rows_of({OURS: given}, lambda *_: {})
        assert row.throttled == "power cap"


@pytest.mark.parametrize("first", [OUT_OF_MEMORY, Measured(2.0, 1, 1)], ids=["never", "once"])
def test_without_the_first_in_every_round_no_implementation_has_a_ratio(first):
    given = {"first": [first, OUT_OF_MEMORY], OURS: [Measured(1.0, 1, 1)] * 2}
    rows = rows_of(given, lambda *_: {})
    assert rows[0].note == OUT_OF_MEMORY and rows[1].ratio is None and rows[1].seconds == 1.0


@pytest.mark.long
@pytest.mark.parametrize("early", [True, False], ids=["before-the-first-text", "in-training"])
def test_memory_is_of_weights_gradients_and_optimizer_whenever_they_are_made(early):
    """Of 64 MiB each, and two moments: what stands before the first text counts as much."""
    model = torch.nn.Linear(4096, 4096, bias=False)
    weight = model.weight
    optimizer, memory = torch.optim.AdamW([weight]), Memory("cpu")

    def make():
        weight.grad = torch.ones_like(weight)
        optimizer.state[weight] = {name: torch.ones_like(weight) for name in ("mean", "square")}

    if early:
        make()
        memory.made(optimizer)
    memory.start(model)
    memory.settle()
    if not early:
        make()
    assert memory.peak() / 2**20 == pytest.approx(4 * 64, abs=16)


def test_implementations_take_turns_and_one_that_was_stopped_is_not_asked_again(task):
    asked = []

    def ask(implementation, task):
        asked.append((task.seed, implementation))
        return "ValueError: no" if implementation == 2 else Measured(1.0, 1, 1)

    settings = dataclasses.replace(SETTINGS, level="full", implementations=frozenset("abc"))
    answers = compare({"a": 1, "b": 2, "left out": 3, "c": 4}, ask, task, settings)
    assert asked == [(0, 1), (0, 2), (0, 4), (1, 4), (1, 1), (2, 4), (2, 1)]
    assert list(answers) == ["a", "b", "c"] and answers["b"] == ["ValueError: no"] * 3
    asked.clear()
    compare({"a": 1, "c": 4}, ask, task, dataclasses.replace(settings, training_s=0.0))
    assert asked == [(0, 1), (0, 4)]  # a round that began is finished


# --- what is asked ---


def test_each_rung_has_the_levers_of_those_before_it(monkeypatch):
    monkeypatch.setattr(steps, "_no_liger", lambda device: None)
    monkeypatch.setattr(steps, "find_spec", lambda name: True)
    rungs = list(ladder(SHAPE, ON_GPU).values())
    assert rungs[0].keywords == steps.NOTHING and rungs[0].func is one_graph
    assert rungs[-1].func is rankpo_fast_adapters and len(rungs) == len(steps.LEVERS)
    for below, above in zip(rungs, rungs[1:], strict=False):
        on = {name for name, value in below.keywords.items() if value is not False}
        on -= {"gradient_checkpointing"}  # of which there is less and more
        more = dict(above.keywords.items() - below.keywords.items())
        changed = on & more.keys()  # bf16 weights become 4-bit ones
        assert changed <= {"weights_dtype"}
        assert len(more) == 1 or (not more and above.func is not below.func)


def test_a_lever_that_is_not_to_be_had_is_a_note_and_in_no_rung(monkeypatch):
    default = dataclasses.replace(SETTINGS, level="default")
    for settings in (SETTINGS, default):
        rungs = ladder(SHAPE, settings)
        assert rungs.pop("+ Liger") == NEEDS_GPU
        assert not any(rung.keywords["use_liger_kernel"] for rung in rungs.values())
    assert list(rungs)[-3:] == [steps.EIGHT_BITS, *steps.ADAPTERS]
    assert rungs["+ bf16"].keywords["torch_compile"]


def test_a_rung_says_which_library_is_missing(monkeypatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: name != "bitsandbytes" or None)
    rungs = ladder(SHAPE, ON_GPU)
    assert rungs[steps.QLORA] == f"bitsandbytes {NOT_INSTALLED}"
    assert rungs[steps.LORA].keywords["weights_dtype"] == "bf16"


def test_adapters_get_weights_only_where_the_disk_has_room_for_them(monkeypatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: True)
    disk = SimpleNamespace(free=64 * 2**30)
    monkeypatch.setattr(steps.shutil, "disk_usage", lambda path: disk)
    for backbone, fits in (("Llama-3.1-8B", True), ("Qwen3-32B", False)):
        rungs = ladder({**SHAPE, "backbone": backbone}, ON_GPU)
        for name in steps.ADAPTERS:
            note = rungs[name]
            assert callable(note) if fits else note.startswith(OUT_OF_MEMORY)
            assert fits or "59.6 GiB to be written, of 64.0 free" in note


def test_random_weights_are_written_once_and_adapters_train_beside_them(task, tmp_path):
    """A backbone of whose directory only the config is there, as of all but the tiny one."""
    bare = tmp_path / "bare"
    shutil.copytree(task.model, bare)
    (bare / "model.safetensors").unlink()
    own = dataclasses.replace(task, model=bare, steps=2, output=tmp_path / "out")
    assert own.from_scratch
    with pytest.raises(InputError, match="--lora_rank and --from_scratch"):
        rankpo_fast(own, lora_rank=4)
    rankpo_fast_adapters(own, lora_rank=4)
    weights = tmp_path / "bare-written" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = dataclasses.replace(own, output=tmp_path / "again")
    rankpo_fast_adapters(again, lora_rank=4)
    assert weights.stat().st_mtime_ns == written and (again.output / "adapter").exists()


def test_attention_that_cannot_serve_here_is_a_note():
    implementations = steps._attention(SHAPE, SETTINGS)
    assert implementations["varlen_attn"] == NEEDS_GPU
    assert implementations["sdpa"].keywords == {"attn_implementation": "sdpa"}
    for name in ("flash_attention_2", "flash_attention_3", "flash_attention_4"):
        assert implementations[name] == NEEDS_GPU or implementations[name].endswith(NOT_INSTALLED)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_shape_is_one_that_a_question_can_be_asked_of(device, level):
    for question in QUESTIONS:
        shapes = question.shapes(device, level)
        assert all(shape["backbone"] in BACKBONES and shape["steps"] > 1 for shape in shapes)
        assert len({str(shape) for shape in shapes}) == len(shapes)
        assert shapes or level == "quick" or (question.name, device) == ("learning", "cpu")
