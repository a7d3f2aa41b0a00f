"""Memory: how much is free, what is found to fit, and what a step does that runs out of it."""

import json
import os
import resource
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError, out_of_memory
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train import meters
from rankpo_fast.train.budget import checkpoint_layers
from rankpo_fast.train.memory import (
    Choice,
    Memory,
    checkpoint_more,
    least_checkpointing,
    why_too_large,
)
from rankpo_fast.train.meters import Gpu, host_free_bytes
from rankpo_fast.train.prefetch import Prefetcher
from rankpo_kernels.workspace import most_workspace

CPU = torch.device("cpu")
LOSS_WORKSPACE = most_workspace(CPU)


class Limit:
    """From the `begin`-th micro-batch on, counted from 1, one of more than `tokens` tokens runs
    out of memory, forward or backward; `times` of them."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory, as it were")

    def __init__(self, monkeypatch, tokens, begin=1, times=10**9, backward=False):
        self.tokens, self.begin, self.times, self.backward = tokens, begin, times, backward
        self.calls, self.vectors = 0, None
        original = Encoder.forward
        monkeypatch.setattr(Encoder, "forward", lambda e, batch: self.forward(original, e, batch))

    def forward(self, original, encoder, batch):
        self.calls += 1
        vectors = original(encoder, batch)
        if self.calls >= self.begin and sum(batch.lengths) > self.tokens and self.times > 0:
            self.vectors = weakref.ref(vectors)
            if not self.backward:
                self.fail()
            if vectors.requires_grad:
                vectors.register_hook(lambda _: self.fail())
        return vectors

    def fail(self):
        if self.times > 0:
            self.times -= 1
            raise type(self.error)(*self.error.args)  # whose traceback nobody else holds


# --- what a step does ---

BUDGET, LIMIT = 150, 100  # two to three micro-batches a batch; the longest text has some 40 tokens


@pytest.fixture
def weights(run_stage, tiny_bert_dir):
    """weights(name of the output, **flags) -> tensors after training, with dropout, and the path"""

    def run(name, **flags):
        output = run_stage("contrastive", tiny_bert_dir, name, max_steps=3, save_steps=1, **flags)
        return load_file(output / "model.safetensors"), output

    return run


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
@pytest.mark.parametrize(
    "begin, backward",
    [
        pytest.param(2, False, id="forward, in the first batch"),
        pytest.param(6, False, id="forward, with gradients of an earlier batch"),
        pytest.param(6, True, id="backward"),
    ],
)
def test_a_step_out_of_memory_is_the_step_of_a_smaller_budget(
    begin, backward, weights, monkeypatch, capsys
):
    Limit(monkeypatch, LIMIT, begin, backward=backward)  # call 1 is that of `measure`
    got, output = weights("got", max_tokens_per_micro_batch=BUDGET)
    said = capsys.readouterr().err
    assert said.count("out of memory, done again with the graphs of ") == 1
    states = sorted((output / "checkpoints").glob("*/state.json"))
    budgets = [json.loads(path.read_text())["max_tokens"] for path in states]
    assert len(set(budgets)) == 1 and budgets[0] <= LIMIT
    monkeypatch.undo()
    assert same(got, weights("expected", max_tokens_per_micro_batch=budgets[0])[0])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 64000000000 bytes. Error code 12"
        ),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
    ids=["torch", "C++", "Python"],
)
def test_the_host_running_out_ends_no_run_either(error, weights, monkeypatch, capsys):
    monkeypatch.setattr(Limit, "error", error)
    Limit(monkeypatch, 0, begin=6, times=1)
    got, _ = weights("got", max_tokens_per_micro_batch=BUDGET)
    assert "done again with the graphs of" in capsys.readouterr().err
    monkeypatch.undo()
    assert same(got, weights("expected", max_tokens_per_micro_batch=BUDGET)[0])


@pytest.mark.parametrize(
    ("said", "is_one"),
    [
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
    ],
)
def test_what_libraries_find_no_memory_for_is_out_of_memory_too(said, is_one):
    """They take theirs beside torch's allocator, which may have left none."""
    assert out_of_memory(RuntimeError(said)) == is_one


def test_with_fewer_graphs_kept_a_step_is_the_same(weights, monkeypatch, capsys):
    Limit(monkeypatch, 0, begin=6, times=1, backward=True)
    got, _ = weights("got", max_tokens_per_micro_batch=BUDGET)
    said = capsys.readouterr().err
    assert "done again with the graphs of" in said and "at most" not in said
    monkeypatch.undo()
    assert same(got, weights("expected", max_tokens_per_micro_batch=BUDGET)[0])


@pytest.mark.long
def test_a_run_goes_on_with_the_budget_that_was_found(weights, monkeypatch):
    Limit(monkeypatch, LIMIT, begin=6)
    expected, output = weights("out", max_tokens_per_micro_batch=BUDGET)
    monkeypatch.undo()
    for path in [*output.glob("*.json"), output / "checkpoints" / "step-00000003" / "state.json"]:
        if path.name != "training.json":
            path.unlink()
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        got, _ = weights("out", max_tokens_per_micro_batch=BUDGET, resume="newest")
    assert same(expected, got)


def test_a_step_that_fails_holds_no_tensor(weights, monkeypatch):
    limit = Limit(monkeypatch, LIMIT, begin=2, backward=True)
    monkeypatch.setattr("rankpo_fast.train.step.release", lambda device: None)
    shrink, held = Memory.shrink, []
    monkeypatch.setattr(
        Memory, "shrink", lambda *args: (held.append(limit.vectors()), shrink(*args))[1]
    )
    weights("out", max_tokens_per_micro_batch=BUDGET)
    assert len(held) >= 2 and not any(x is not None for x in held)


@pytest.mark.long
def test_when_nothing_is_left_to_shrink_flags_are_named_and_no_weight_has_changed(
    weights, monkeypatch
):
    Limit(monkeypatch, 0, begin=2)
    monkeypatch.setattr("rankpo_fast.train.optim.Optimizer.update", None)  # must not be called
    with pytest.raises(InputError, match="--gradient_checkpointing true.*--max_passage_length"):
        weights("out", max_tokens_per_micro_batch=BUDGET)


def test_what_was_packed_for_another_budget_is_packed_again():
    memory = Memory(40, 0.0, 1.0)
    with Prefetcher(lambda step, budget: [(step, budget)], range(5), memory) as steps:
        assert next(steps) == [(0, 40)]
        memory.max_tokens = 20
        assert steps.repacked() == [(0, 20)]
        assert [packed for [packed] in steps] == [(step, 20) for step in range(1, 5)]


def test_graphs_are_given_up_before_tokens():
    group = type("Group", (), {"lengths": (30, 10)})
    memory = Memory(60, 1e9, graph_bytes=1.0, longest=16)
    seen = []
    with pytest.raises(InputError, match="16 tokens, the longest text"):
        while True:
            memory.shrink([[group] * 4, [group]])
            seen.append((memory.kept([group] * 4), memory.max_tokens))
    assert seen == [(2, 60), (1, 60), (1, 20), (1, 16)]


# --- what is found before ---


class Simulated:
    """A card where a token's graph takes 10 bytes, its peak 15, and anything another 100."""

    warns = True

    def __init__(self, monkeypatch, free):
        self._free = free
        forward = Encoder.forward

        def counted(encoder, batch):
            self.tokens = sum(batch.lengths)
            return forward(encoder, batch)

        monkeypatch.setattr(Encoder, "forward", counted)
        monkeypatch.setattr("rankpo_fast.train.memory.meter_of", lambda device: self)

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *exception: None  # noqa: E731
    held = lambda self: 10 * self.tokens  # noqa: E731
    peak = lambda self: 15 * self.tokens + 100  # noqa: E731
    free = lambda self: self._free + LOSS_WORKSPACE  # noqa: E731


@pytest.fixture
def long_texts(tiny_bert_dir):
    """An encoder with dropout, in training, and a table of 40 texts, the longest of 17 tokens."""
    encoder = load_encoder(EncoderConfig(str(tiny_bert_dir)), device=torch.device("cpu")).train()
    table = encoder.tokenize_passages(["nurse " * 5 + "x" * (i % 3) for i in range(40)])
    return encoder, table, int(table.lengths.max())


def test_a_budget_is_found_by_doubling_up_to_half_of_a_card(long_texts, monkeypatch):
    encoder, table, longest = long_texts
    monkeypatch.setattr("rankpo_fast.train.memory.most_workspace", lambda device: 0)
    monkeypatch.setattr(f"{__name__}.LOSS_WORKSPACE", 0)
    gpu = Simulated(monkeypatch, free=4 * (15 * 4 * longest + 100))
    before = torch.get_rng_state()
    memory = Memory.measure(encoder, table, None, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in encoder.parameters())
    assert memory.max_tokens in (4 * longest, 8 * longest)
    assert 2 * gpu.peak() <= gpu.free()  # while one is at work, another half is free
    assert memory.graph_bytes == 10
    assert memory.room == gpu.free() - (gpu.peak() - gpu.held())


@pytest.mark.long
def test_what_a_card_has_no_room_for_is_passed_over(long_texts, monkeypatch):
    """Its free memory may be in pieces."""
    encoder, table, longest = long_texts
    Simulated(monkeypatch, free=10**9)
    Limit(monkeypatch, 5 * longest)
    memory = Memory.measure(encoder, table, None, None)
    assert memory.max_tokens == 4 * longest
    assert longest < Memory.measure(encoder, table, 7 * longest, None).max_tokens < 7 * longest
    Limit(monkeypatch, longest - 1)
    with pytest.raises(InputError, match=f"{longest} tokens, the longest text"):
        Memory.measure(encoder, table, None, None)
    assert all(p.grad is None for p in encoder.parameters())


def test_a_budget_that_does_not_fit_is_refused_with_one_that_does(weights, monkeypatch):
    Limit(monkeypatch, LIMIT)
    with pytest.raises(InputError, match="--max_tokens_per_micro_batch 150 .*: [0-9]+ does") as e:
        weights("out", max_tokens_per_micro_batch=BUDGET)
    fits = int(str(e.value).split()[-2])
    weights("out", max_tokens_per_micro_batch=fits, overwrite_output_dir=True)


def test_without_a_flag_no_text_is_too_long(weights, monkeypatch):
    monkeypatch.setattr("rankpo_fast.data.packing.DEFAULT_BUDGET", {"cpu": 8})
    weights("out")


# --- whether layers are checkpointed, where nobody says ---


def test_on_a_card_layers_are_checkpointed_where_the_longest_texts_do_not_fit(
    long_texts, monkeypatch
):
    encoder, table, longest = long_texts
    Simulated(monkeypatch, free=10**9)
    assert why_too_large(encoder, table, None) is None
    Limit(monkeypatch, 4 * longest)
    assert why_too_large(encoder, table, 4 * longest) is None
    assert why_too_large(encoder, table, 5 * longest).startswith(f"{5 * longest:,} tokens at")
    assert why_too_large(encoder, table, None).startswith("1,024 tokens at once do not fit")
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("words", [12, 120], ids=["short-texts", "longer-than-what-is-tried"])
def test_what_the_host_would_take_is_reckoned_from_a_little(words, tiny_bert_dir, monkeypatch):
    """With dropout, where attention keeps its weights: a token takes more in a longer text."""
    encoder = load_encoder(ModelConfig(str(tiny_bert_dir), bf16=False), device=CPU).train()
    table = encoder.tokenize_passages(["nurse " * (words - i) for i in range(3)])
    monkeypatch.setattr("rankpo_fast.train.memory.HOST_TRIAL", 10**6)
    tokens = int(table.lengths.sum())
    tried = Memory.measure(encoder, table, tokens, None)
    monkeypatch.setattr("rankpo_fast.train.memory.HOST_TRIAL", 60)
    reckoned = Memory.measure(encoder, table, tokens, None)
    assert reckoned.max_tokens == tried.max_tokens == tokens
    assert reckoned.graph_bytes == pytest.approx(tried.graph_bytes, rel=0.1)


def test_copies_of_weights_are_reckoned_once_not_for_every_token(tiny_bert_dir, monkeypatch):
    """Those in bf16 that a graph keeps, whose layers are not checkpointed."""
    config = ModelConfig(str(tiny_bert_dir), bf16=True, disable_dropout=True)
    encoder = load_encoder(config, device=CPU).train()
    table = encoder.tokenize_passages(["nurse " * 40] * 40)
    monkeypatch.setattr("rankpo_fast.train.memory.HOST_TRIAL", 10**6)
    tried = Memory.measure(encoder, table, 800, None)
    monkeypatch.setattr("rankpo_fast.train.memory.HOST_TRIAL", 100)
    reckoned = Memory.measure(encoder, table, 800, None)
    assert reckoned.graph_bytes == pytest.approx(tried.graph_bytes, rel=0.05)


@pytest.fixture
def host(monkeypatch):
    """host(bytes) may be taken, besides what the loss takes."""

    def leave(size):
        monkeypatch.setattr(meters.Host, "free", lambda self: size + LOSS_WORKSPACE)

    return leave


def test_on_the_host_a_smaller_micro_batch_goes_before_checkpointing(tiny_bert_dir, host):
    encoder = load_encoder(ModelConfig(str(tiny_bert_dir), bf16=False), device=CPU).train()
    table = encoder.tokenize_passages(["nurse " * 60] * 40)
    host(1e12)
    roomy = Memory.measure(encoder, table, None, None)
    host(1500 * roomy.graph_bytes)
    assert (
        roomy.max_tokens == 4096 and Memory.measure(encoder, table, None, None).max_tokens == 1024
    )
    assert why_too_large(encoder, table, None) is None
    assert "2,048 tokens at once would take" in why_too_large(encoder, table, 2048)
    host(500 * roomy.graph_bytes)
    assert "1,024 tokens at once would take" in why_too_large(encoder, table, None)
    with pytest.warns(UserWarning, match="the system ends the run; --gradient_checkpointing true"):
        Memory.measure(encoder, table, None, None)


def test_on_the_host_layers_are_checkpointed_as_little_as_will_do(long_texts, host):
    encoder, table, _ = long_texts
    table = encoder.tokenize_passages(["nurse " * 60] * 40)
    sizes = {}  # bytes that a token takes
    for way in (False, "selective", True):
        encoder.layers.checkpoint(way)
        sizes[way] = Memory.measure(encoder, table, 1024, 0.0).graph_bytes
    assert sizes[True] < 0.5 * sizes["selective"] < 0.4 * sizes[False]
    for way in sizes:
        host(1024 * 1.1 * sizes[way])
        choice = least_checkpointing(encoder, table, None)
        assert choice.way == way
        assert encoder.layers.checkpointed == way
        assert ("tokens at once would take" in choice.reason) == bool(way)


def test_what_is_measured_is_a_step_in_training(long_texts):
    """In eval mode no layer is checkpointed, and nothing is dropped."""
    encoder, table, _ = long_texts
    encoder.layers.checkpoint()
    trained = Memory.measure(encoder, table, 40, 0.0).graph_bytes
    assert Memory.measure(encoder.eval(), table, 40, 0.0).graph_bytes == trained
    assert not encoder.training


def test_out_of_memory_layers_are_checkpointed_selectively_first(long_texts):
    encoder, _, _ = long_texts
    group = type("Group", (), {"lengths": (16,)})
    memory = Memory(16, 0.0, 1.0, longest=16, checkpoint_more=partial(checkpoint_more, encoder))
    for how, way in ((" selectively", "selective"), ("", True)):
        assert memory.shrink([[group]]) == f"layers checkpointed{how} from now on"
        assert encoder.layers.checkpointed == way
    with pytest.raises(InputError, match="16 tokens, the longest text"):
        memory.shrink([[group]])


def test_graphs_that_lie_on_the_host_end_where_the_host_does():
    group = type("Group", (), {"lengths": (30, 10)})
    memory = Memory(60, 1e9, 1.0, host_bytes=10.0, host_room=1000.0)
    assert memory.kept([group] * 4) == 2


def test_a_run_checkpoints_where_it_must_and_says_so(weights, host, capsys):
    flags = {"activation_memory_gb": 1.0}
    expected, _ = weights("roomy", gradient_checkpointing="auto", **flags)
    assert "layers are not checkpointed: 1,024 tokens at once fit" in capsys.readouterr().err
    host(1e5)
    got, _ = weights("tight", gradient_checkpointing="auto", **flags)
    said = capsys.readouterr().err
    assert "layers are checkpointed: 1,024 tokens at once would take" in said
    assert same(got, expected)  # no bit depends on it


@pytest.mark.long
def test_out_of_memory_layers_are_checkpointed_before_a_run_ends(weights, monkeypatch, capsys):
    calls, forward = [], Encoder.forward

    def fails_unless_checkpointed(encoder, batch):
        calls.append(batch)
        if len(calls) > 2 and encoder.layers.checkpointed is not True:
            raise torch.OutOfMemoryError("CUDA out of memory, as it were")
        return forward(encoder, batch)

    monkeypatch.setattr(Encoder, "forward", fails_unless_checkpointed)
    got, output = weights("got", gradient_checkpointing="auto", max_tokens_per_micro_batch=BUDGET)
    assert "layers checkpointed from now on" in capsys.readouterr().err
    monkeypatch.undo()
    [*_, state] = sorted((output / "checkpoints").glob("*/state.json"))
    budget = json.loads(state.read_text())["max_tokens"]
    assert same(got, weights("expected", max_tokens_per_micro_batch=budget)[0])


def test_where_one_rank_has_to_checkpoint_all_do(long_texts):
    encoder, table, _ = long_texts
    other = Choice("selective", "too large")
    ranks = SimpleNamespace(objects=lambda own: [own, other, own])
    choice = checkpoint_layers(ranks, encoder, table, None)
    assert choice == other and encoder.layers.checkpointed == "selective"


# --- how much is free ---


def test_a_card_counts_what_its_allocator_holds_unused(monkeypatch):
    figures = {"mem_get_info": (600, 1000), "memory_reserved": 300, "memory_allocated": 100}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 170)
    gpu = Gpu(torch.device("cuda", 0))
    assert gpu.free() == pytest.approx(meters.GPU_SHARE * 800)
    with gpu:
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 140)
        assert (gpu.held(), gpu.peak()) == (40, 70)


MACHINE = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4 kB\nHugePages_Total: 0\n"}
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    "files, free",
    [
        pytest.param({}, 4096, id="no groups"),
        pytest.param(
            {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "max\n",
             f"{V2}/a/b/memory.current": "50\n", f"{V2}/a/memory.max": "1000\n",
             f"{V2}/a/memory.current": "700\n", f"{V2}/a/memory.stat": "inactive_file 200\n"},
            500, id="version 2, the limit is the parent's and its file cache is no use",
        ),
        pytest.param(
            {"proc/self/cgroup": "5:cpu,memory:/docker/1\n0::/\n",
             f"{V1}/memory.limit_in_bytes": "900\n", f"{V1}/memory.usage_in_bytes": "100\n"},
            800, id="version 1, inside the container",
        ),
        pytest.param(
            {"proc/self/cgroup": "5:memory:/x\n", f"{V1}/x/memory.usage_in_bytes": "100\n",
             f"{V1}/x/memory.limit_in_bytes": "9223372036854771712\n"},
            4096, id="version 1 without a limit",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "9\n",
             f"{V2}/memory.current": "20\n"},
            0, id="over the limit",
        ),
    ],
)  # fmt: skip
def test_the_host_has_free_what_every_group_leaves(files, free, tmp_path):
    for name, text in {**MACHINE, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_free_bytes(tmp_path) == free


@pytest.mark.parametrize("kind, name", [("AS", "VmSize"), ("DATA", "VmData")])
def test_the_host_has_free_what_the_limits_of_the_process_leave(kind, name, tmp_path, monkeypatch):
    files = {**MACHINE, "proc/self/status": f"Name:\tpython\n{name}:\t 2 kB\n"}
    for place, text in files.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    limited = getattr(resource, f"RLIMIT_{kind}")
    limits = {limited: (3000, 4000)}
    monkeypatch.setattr(
        resource, "getrlimit", lambda what: limits.get(what, (resource.RLIM_INFINITY,) * 2)
    )
    assert host_free_bytes(tmp_path) == 3000 - 2048


def test_a_host_that_does_not_tell_has_what_it_is_built_with(tmp_path):
    assert host_free_bytes(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
