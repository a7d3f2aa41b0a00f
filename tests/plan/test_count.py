"""What is predicted from config.json is what a real encoder of that shape takes."""

import json

import pytest
import torch

from bench.planned import BERT, LEVERS, LLAMA, compare
from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.plan.count import PEAK, count, measure
from rankpo_fast.plan.gpus import FRAGMENTATION, GPUS
from rankpo_fast.plan.skeleton import read_shape
from rankpo_fast.plan.standins import IN_FP32, attention_flops
from rankpo_fast.train.meters import GPU_SHARE
from support.model_families import FAMILIES

CLOSE = 0.05  # what the plan promises; all but 4-bit scales are equal to the byte


def config_of(family: str) -> dict:
    import transformers

    kind, sizes = FAMILIES[family]
    layers = {"num_hidden_layers": 6}
    if "layer_types" in sizes:
        layers["layer_types"] = 3 * sizes["layer_types"]
    return getattr(transformers, f"{kind}Config")(**sizes | layers).to_dict()


@pytest.fixture
def directory(tmp_path):
    def make(**changes) -> str:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    "family",
    [
        family if family in ("qwen3", "bert") else pytest.param(family, marks=pytest.mark.long)
        for family in FAMILIES
    ],
)
def test_the_bytes_of_every_family_are_predicted(family):
    found = compare(family, config_of(family), {})
    assert found.measured["graph"] > 0 and found.measured["peak"] > found.measured["graph"]
    assert max(found.errors().values()) < CLOSE, found


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("fp32, checkpointed", "QLoRA")
        else pytest.param(name, marks=pytest.mark.long)
        for name in LEVERS
    ],
)  # fmt: skip
def test_the_bytes_of_every_lever_are_predicted(name):
    found = compare(name, LLAMA, LEVERS[name])
    assert max(found.errors().values()) < CLOSE, found


@pytest.mark.parametrize(
    "optim",
    [
        "adamw_8bit",
        *(pytest.param(optim, marks=pytest.mark.long)
          for optim in ("adamw_4bit", "adamw_fp8", "paged_adamw_8bit", "muon")),
    ],
)  # fmt: skip
def test_the_states_of_every_optimizer_are_predicted(optim):
    assert max(compare(optim, LLAMA, {}, optim).errors().values()) < CLOSE


# In fp32 autocast's copies of all weights make the end of the forward the peak, but only of many
# layers: what is counted on three of them has to tell the two moments apart.
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_a_deep_model_is_counted_on_few_of_its_layers(tmp_path, kind, dtype):
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 24}
    own = {"llama": LLAMA, "bert": BERT}[kind]
    (tmp_path / "config.json").write_text(json.dumps(own | wide))
    model = ModelConfig(
        model_name_or_path=str(tmp_path), weights_dtype=dtype, gradient_checkpointing=True,
        max_query_length=48, max_passage_length=48, bf16=True,
    )  # fmt: skip
    shape = read_shape(model)
    counts, tokens = count(shape, model, GPUS["80"], bf16=True), 85 * 48  # the smaller count's
    whole = measure(shape, model, GPUS["80"], 24, tokens, bf16=True)
    peak = max(size for name, size in whole.items() if name.startswith(PEAK))
    assert counts.peak(tokens) == pytest.approx(peak, rel=1e-9)
    assert counts.graph.at(tokens) == pytest.approx(whole["graph"], rel=1e-9)
    assert counts.weights == pytest.approx(whole["weights"], rel=1e-9)
    assert [*counts.seconds] and all(
        line.at(tokens) == pytest.approx(whole[name], rel=1e-6)
        for name, line in counts.seconds.items()
    )


def test_layers_of_several_kinds_are_counted_by_their_period(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("gemma3")))
    model = ModelConfig(model_name_or_path=str(tmp_path), max_passage_length=48)
    shape = read_shape(model)
    assert (shape.layers, shape.period) == (6, 2)


def test_values_that_decide_what_is_computed_are_an_error_not_a_guess(directory):
    eager = ModelConfig(model_name_or_path=directory(), attn_implementation="eager")
    with pytest.raises(InputError, match="a plan counts packed texts"):
        read_shape(eager)


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (5, 0), (5, 5)])
def test_attention_counts_the_tokens_that_are_seen(window):
    length, heads, dims = 12, 3, 8
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    before, after = (length if side < 0 else side for side in window)
    seen = ((rows - columns <= before) & (columns - rows <= after)).sum().item()
    [forward, backward] = attention_flops(length).values()
    query = torch.empty(2 * length, heads, dims, device="meta")
    assert forward(query=query, window_size=window) == 2 * 4 * heads * dims * seen
    assert backward(query=query, window_size=window) == 2.5 * 2 * 4 * heads * dims * seen


def test_autocast_of_cuda_has_the_functions_that_the_plan_computes_in_fp32():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in IN_FP32:
        op = f"aten::{name}.dim_IntList" if name == "sum" else f"aten::{name}"
        op += {"pow": ".Tensor_Scalar", "softmax": ".int", "log_softmax": ".int",
               "norm": ".Scalar"}.get(name, "")  # fmt: skip
        assert has(op, "AutocastCUDA"), op
        assert not has(op, "AutocastCPU"), op


def test_what_is_lost_between_blocks_is_what_a_run_leaves_free():
    assert pytest.approx(1 - GPU_SHARE) == FRAGMENTATION
