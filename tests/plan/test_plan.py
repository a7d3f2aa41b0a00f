"""`rankpo-fast plan`: from a config.json to settings, a command line and a reason."""

import json
import shlex
from dataclasses import replace

import pytest
import torch

from bench.planned import LLAMA
from rankpo_fast.cli import COMMANDS, main
from rankpo_fast.config import ModelConfig, TrainingConfig
from rankpo_fast.errors import InputError
from rankpo_fast.flags import parse
from rankpo_fast.plan.auto import auto_settings
from rankpo_fast.plan.gpus import GPUS, gpu_of
from rankpo_fast.plan.search import Asked, find

SHORT = ["--max_query_length", "32", "--max_passage_length", "128"]
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
         "num_key_value_heads": 4, "vocab_size": 32000,
         "max_position_embeddings": 4096}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """Of config.json alone, with so many layers."""

    def make(layers: int, **changes) -> str:
        config = LLAMA | SIZES | {"num_hidden_layers": layers} | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


def planned(capsys, *flags: str) -> dict:
    assert main(["plan", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_weights_are_trained_where_they_fit(directory, capsys):
    found = planned(capsys, "--model_name_or_path", directory(4), "--gpu", "24")
    assert found["fits"] and found["method"] == "full"
    assert "weights_dtype" not in found["flags"]  # fp32
    assert {"weights", "adapters", "gradients", "optimizer", "loss"} <= found["bytes"].keys()
    taken = sum(found["bytes"].values()) - found["bytes"]["host"] + found["free_bytes"]
    assert taken == pytest.approx(found["gpu"]["bytes"], rel=1e-6)
    assert found["max_tokens_per_micro_batch"] >= 4096 and found["tokens_per_second"] > 0
    later = [one["method"] for one in found["passed_over"]]
    assert later[-2:] == ["lora", "qlora"]


@pytest.mark.long
def test_the_first_way_that_fits_is_taken_though_a_later_one_is_faster(directory):
    path = directory(100)  # 1.6e9 parameters: 24 bytes each do not fit, 8 do
    plan = find(Asked(ModelConfig(path, max_passage_length=512), gpu_of("24"), 32, 5))
    ways = [*plan.passed, plan.best]
    fitting = [one for one in ways if one.fits]
    assert plan.best.levers.method == "full" and len(fitting) > 1
    small = find(Asked(ModelConfig(path, max_passage_length=512), gpu_of("6"), 32, 5))
    assert small.best.levers.method in ("lora", "qlora")
    assert all(not one.fits for one in small.passed if one.levers.method == "full")


@pytest.mark.long
def test_the_command_line_is_one_of_the_training(directory, capsys):
    flags = ["--model_name_or_path", directory(4), "--gpu", "24", "--method", "qlora"]
    command = shlex.split(planned(capsys, *flags)["command"])
    assert command[:2] == ["rankpo-fast", "contrastive"]
    settings = parse("contrastive", "train", COMMANDS["contrastive"].settings, command[2:])
    assert settings[0].weights_dtype == "nf4" and settings[0].lora_rank == 16


def test_what_the_user_set_stays(directory, capsys):
    flags = ["--gpu", "24", "--weights_dtype", "bf16", "--gradient_checkpointing", "true",
             "--optim", "adamw_4bit", "--lora_rank", "3"]  # fmt: skip
    found = planned(capsys, "--model_name_or_path", directory(4), *flags)
    given = {"weights_dtype": "bf16", "gradient_checkpointing": True, "optim": "adamw_4bit",
             "lora_rank": 3}  # fmt: skip
    assert given.items() <= found["flags"].items() and found["passed_over"] == []


FULL = ["--gpu", "80", "--method", "full", "--optim", "adamw_8bit"]  # one way


@pytest.mark.long
def test_layers_are_compiled_where_that_is_counted_to_be_faster(directory, capsys):
    model = ["--model_name_or_path", directory(4), *FULL]
    chosen = planned(capsys, *model, "--gradient_checkpointing", "false")
    assert chosen["flags"]["torch_compile"] is True and chosen["speedup_of_torch_compile"] > 1.05
    plain = planned(capsys, *model, "--gradient_checkpointing", "false", "--torch_compile", "false")
    assert plain["flags"]["torch_compile"] is False and plain["speedup_of_torch_compile"] is None
    ratio = chosen["tokens_per_second"] / plain["tokens_per_second"]
    assert ratio == pytest.approx(chosen["speedup_of_torch_compile"])
    assert chosen["bytes"] == plain["bytes"]  # less is not promised


@pytest.mark.parametrize(
    "flags",
    [["--gradient_checkpointing", "selective"], ["--mlp_chunk", "4096"]],
    ids=["selective", "chunks"],
)
def test_layers_are_not_compiled_beside_what_has_to_see_into_them(directory, capsys, flags):
    found = planned(capsys, "--model_name_or_path", directory(4), *FULL, *flags)
    assert "torch_compile" not in found["flags"]


@pytest.mark.long
def test_compiled_layers_that_are_asked_for_are_in_every_way(directory):
    model = ModelConfig(directory(4), torch_compile=True, max_passage_length=512)
    plan = find(Asked(model, GPUS["24"], 8, 1))
    assert all(one.levers.torch_compile for one in [plan.best, *plan.passed])
    assert all(one.levers.gradient_checkpointing != "selective" for one in plan.passed)


@pytest.mark.parametrize("way", [{"processes": 2}, {"method": "qlora"}], ids=["ranks", "4-bits"])
def test_layers_are_not_compiled_unasked_where_nobody_has_tried(directory, way):
    model = ModelConfig(directory(2), max_passage_length=512, gradient_checkpointing=True)
    assert not find(Asked(model, GPUS["24"], 8, 1, **way)).best.levers.torch_compile


def test_float8_is_proposed_and_not_chosen(directory, capsys):
    sizes = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32}
    model = ModelConfig(directory(3, **sizes), gradient_checkpointing=False)
    asked = Asked(model, GPUS["141"], 8, 1, method="full", offload=("optimizer",))
    plan = find(asked)
    assert plan.float8 is not None and 1.05 < plan.float8 < 2
    assert find(replace(asked, gpu=replace(asked.gpu, float8=False))).float8 is None
    given = find(replace(asked, model=replace(model, float8=True)))
    ratio = given.best.tokens_per_second / plan.best.tokens_per_second
    assert given.float8 is None and ratio == pytest.approx(plan.float8)
    with pytest.raises(InputError, match="no products in 8 bits"):
        find(replace(given.asked, gpu=replace(asked.gpu, float8=False)))


@pytest.mark.long
def test_a_gpu_too_small_for_any_way_says_by_how_much_and_what_would_fit(directory, capsys):
    path = directory(48, hidden_size=4096, intermediate_size=16384, num_attention_heads=32)
    flags = ["--model_name_or_path", path, "--gpu", "12", "--method", "lora", *SHORT]
    assert main(["plan", *flags, "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["fits"] is False
    assert "GiB too much" in printed.err
    assert "one L40S" in printed.err and "4 such GPUs" in printed.err
    assert "--method qlora" in printed.err


@pytest.mark.long
def test_shared_weights_take_a_part_of_each_gpu(directory):
    model = ModelConfig(directory(8), max_passage_length=512, gradient_checkpointing=True)
    asked = Asked(model, GPUS["24"], 8, 1, method="full")
    alone, four = find(asked).best, find(replace(asked, shard="full", processes=4)).best
    assert four.parts["optimizer"] == alone.parts["optimizer"] / 4
    assert alone.parts["weights"] / 4 < four.parts["weights"] < alone.parts["weights"]


@pytest.mark.long
def test_a_longer_text_takes_more_and_a_larger_batch_almost_nothing(directory):
    model = ModelConfig(directory(4), max_passage_length=256, max_query_length=32)
    few = find(Asked(model, GPUS["24"], 8, 1, method="lora")).best
    many = find(Asked(model, GPUS["24"], 8000, 1, method="lora")).best
    assert many.parts["micro-batch"] == few.parts["micro-batch"]
    assert many.parts["loss"] - few.parts["loss"] < 2**30


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--gpu", "many"], "--gpu must be"),
        (["--gpu", "24", "--shard", "full"], "--processes"),
        (["--gpu", "24", "--method", "full", "--lora_rank", "4"], "--method full"),
        (["--gpu", "24", "--picture", "x.pdf"], "--picture"),
        (["--gpu", "24", "--layers", "9"], "--layers 9"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(directory, capsys, flags, reason):
    assert main(["plan", "--model_name_or_path", directory(4), *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.long
def test_the_picture_and_the_table_say_the_same(directory, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    flags = ["--model_name_or_path", directory(4), "--gpu", "48", "--picture", str(picture)]
    assert main(["plan", *flags, "--gradient_checkpointing", "true"]) == 0
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "all weights in fp32, adamw" in text and "largest micro-batch" in text
    assert "(a model, not a measurement)" in text and "L40S: 362 TFLOP/s" in text


def test_auto_is_for_a_gpu(directory):
    training = TrainingConfig(output_dir="out", auto=True)
    with pytest.raises(InputError, match="--auto fits a training into a GPU's memory"):
        auto_settings(
            ModelConfig(directory(2)), training, device=torch.device("cpu"), free_bytes=1e9,
            negatives=5,
        )  # fmt: skip


def test_auto_takes_the_plan_and_leaves_what_is_set(directory, monkeypatch):
    monkeypatch.setattr("rankpo_fast.plan.auto.gpu_here", lambda device: GPUS["80"])
    training = TrainingConfig(output_dir="out", auto=True, optim="adamw_4bit")
    model, chosen, said = auto_settings(
        ModelConfig(directory(4), weights_dtype="bf16"), training, negatives=5,
        device=torch.device("cuda"), free_bytes=4e9, lengths=(32, 128),
    )  # fmt: skip
    assert chosen.optim == "adamw_4bit" and model.gradient_checkpointing == "auto"
    assert model.max_passage_length is None  # the texts' length is not made a limit
    assert model.torch_compile is True and "layers compiled" in said
    assert "of 3.7 GiB free" in said
