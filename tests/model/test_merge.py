"""What merging keeps bit by bit, what lies between, and what it refuses by name."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankpo_fast.cli import main
from rankpo_fast.config import EncoderConfig, MergeConfig
from rankpo_fast.errors import InputError
from rankpo_fast.functions import merge_models
from rankpo_fast.model import merge as module
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.merge import merge

WORDS = "embeddings.word_embeddings.weight"
TEXTS = ["a nurse in Lyon", "software developer"]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("model*.safetensors"):
        found |= load_file(file)
    return found


def changed(directory: Path, into: Path, change) -> Path:
    """A copy whose tensors are what `change` makes of {name: tensor}."""
    shutil.copytree(directory, into)
    save_file(change(weights(directory)), into / "model.safetensors", {"format": "pt"})
    return into


def noise(scale: float, seed: int = 0):
    def add(tensors):
        generator = torch.Generator().manual_seed(seed)
        return {k: t + scale * torch.randn(t.shape, generator=generator).to(t.dtype)
                for k, t in tensors.items()}  # fmt: skip

    return add


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_bert_dir) -> Path:
    """With pooling and prefixes in files, as stage 1 leaves a model."""
    directory = tmp_path_factory.mktemp("merge") / "base"
    encoder = load_encoder(
        EncoderConfig(str(tiny_bert_dir), pooling="cls", query_prefix="q: ", max_query_length=64),
        device=torch.device("cpu"),
    )
    encoder.save(directory)
    return directory


@pytest.fixture(scope="module")
def tuned(base) -> Path:
    directory = changed(base, base.parent / "tuned", noise(0.02))
    (directory / "training.json").write_text("{}")
    return directory


def merged(tmp_path, *models: Path, base: Path | None = None, **settings) -> Path:
    settings = {"output_dir": str(tmp_path / "merged"), **settings}
    [directory] = merge(MergeConfig(
        list(map(str, models)), base_model_name_or_path=base and str(base), **settings
    ))  # fmt: skip
    return directory


def vectors(directory: Path) -> torch.Tensor:
    encoder = load_encoder(EncoderConfig(str(directory)), device=torch.device("cpu"))
    return torch.as_tensor(encoder.encode(TEXTS, "query"))


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_alpha_0_and_1_are_bitwise_the_inputs(method, kind, base, tuned, tmp_path):
    def stored(tensors):
        tensors[WORDS][0] = -0.0  # which a sum would make 0.0
        return {name: t.to(kind) for name, t in tensors.items()}

    ends = [changed(model, tmp_path / model.name, stored)
            for model in (base, tuned)]  # fmt: skip
    for alpha, end in enumerate(ends):
        made = merged(tmp_path, ends[1], base=ends[0], alpha=[str(alpha)], method=method,
                      output_dir=str(tmp_path / f"{alpha}"))  # fmt: skip
        ours, theirs = weights(made), weights(end)
        assert ours.keys() == theirs.keys()
        assert all(t.dtype == kind for t in ours.values())
        assert all(torch.equal(t.view(torch.uint8), theirs[k].view(torch.uint8))
                   for k, t in ours.items())  # fmt: skip


def test_linear_is_the_line_in_blocks_of_any_size(base, tuned, tmp_path, monkeypatch):
    """Blocks of 100 elements cut a row count that is no multiple of theirs."""
    monkeypatch.setattr(module, "ELEMENTS", 100)
    made, b, t = (
        weights(d) for d in (merged(tmp_path, tuned, base=base, alpha=["1.5"]), base, tuned)
    )
    for name in b:
        expected = b[name].double() + 1.5 * (t[name].double() - b[name].double())
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_slerp_turns_by_the_share_of_the_angle(base, tuned, tmp_path, monkeypatch):
    """Also for tensors so close that an arc cosine in fp32 would have no angle of them left."""
    monkeypatch.setattr(module, "ELEMENTS", 100)

    def mixed(tensors):
        near = {name: t * (1 + 1e-4 * torch.linspace(0, 1, t.numel()).view_as(t))
                for name, t in tensors.items()}  # fmt: skip
        return {k: near[k] if "layer.0" in k else noise(0.5)({k: t})[k]
                for k, t in tensors.items()}  # fmt: skip

    other = changed(base, tmp_path / "other", mixed)
    made = weights(merged(tmp_path, other, base=base, alpha=["0.25"], method="slerp"))
    b, t = weights(base), weights(other)
    for name in b:
        x, y = b[name].flatten().double(), t[name].flatten().double()
        if not x.any() or not y.any():
            continue
        u, v = x / x.norm(), y / y.norm()
        angle = 2 * math.asin(min(1.0, (u - v).norm().item() / 2))
        if angle < 1e-9:
            expected = x
        else:
            shares = [math.sin(share * angle) / math.sin(angle) for share in (0.75, 0.25)]
            expected = shares[0] * x + shares[1] * y
        torch.testing.assert_close(
            made[name].flatten().double(), expected, rtol=2e-6, atol=1e-7, msg=name
        )


def test_no_arc_is_taken_between_opposites(base, tmp_path):
    other = changed(base, tmp_path / "other", lambda t: {**t, WORDS: -2 * t[WORDS]})
    with pytest.raises(InputError, match=f"{WORDS} has opposite directions"):
        merged(tmp_path, other, base=base, alpha=["0.5"], method="slerp")


def test_several_models_are_weighed(base, tuned, tmp_path):
    third = changed(base, tmp_path / "third", noise(0.02, seed=1))
    made = weights(merged(tmp_path, tuned, third, weights=[3, 1]))
    again = weights(merged(tmp_path, tuned, third, base=base, alpha=["0.5"], weights=[3, 1],
                           output_dir=str(tmp_path / "half")))  # fmt: skip
    b, one, two = map(weights, (base, tuned, third))
    for name in made:
        mean = 0.75 * one[name].double() + 0.25 * two[name].double()
        torch.testing.assert_close(made[name].double(), mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            again[name].double(), (b[name].double() + mean) / 2, rtol=1e-6, atol=1e-7
        )


def test_what_says_how_to_read_is_the_tuned_models_and_the_model_loads(base, tuned, tmp_path):
    made = merged(tmp_path, tuned, base=base, alpha=["0.75"])
    kept = ("tokenizer.json", "modules.json", "rankpo_fast.json", "1_Pooling/config.json")
    assert all((made / name).read_bytes() == (tuned / name).read_bytes() for name in kept)
    assert not (made / "training.json").exists()
    record = json.loads((made / "merge.json").read_text())
    assert (record["alpha"], record["weights"], record["method"]) == (0.75, [1.0], "linear")
    ends = [vectors(d) for d in (base, made, tuned)]
    assert all((a - b).norm() > 1e-4 for a, b in zip(ends, ends[1:], strict=False))


def test_a_grid_makes_a_directory_of_each_value(base, tuned, tmp_path, capsys):
    out = tmp_path / "grid"
    argv = ["merge", "--base", base, "--model", tuned, "--alpha", "0:0.3:0.1", "1"]
    assert main([*map(str, argv), "--output_dir", str(out)]) == 0
    names = [f"alpha-{value}" for value in ("0", "0.1", "0.2", "0.3", "1")]
    assert sorted(path.name for path in out.iterdir()) == names
    assert capsys.readouterr().out.count("model saved in") == 5
    b, t = weights(base), weights(tuned)
    for name, alpha in (("alpha-0.3", 0.3), ("alpha-1", 1.0)):
        key = WORDS
        torch.testing.assert_close(weights(out / name)[key], b[key] + alpha * (t[key] - b[key]))


@pytest.mark.parametrize("alpha", [0.25, [0, 0.25], "0:0.25:0.25"])
def test_python_gives_alpha_as_numbers_or_grids(alpha, base, tuned, tmp_path):
    merged = merge_models(tuned, tmp_path / "out", base_model_name_or_path=str(base), alpha=alpha)[
        -1
    ]
    b, t = weights(base), weights(tuned)
    torch.testing.assert_close(weights(merged)[WORDS], b[WORDS] + 0.25 * (t[WORDS] - b[WORDS]))


def test_dtypes_are_the_bases_and_that_is_said(base, tuned, tmp_path):
    half = changed(base, tmp_path / "half", lambda t: {k: v.bfloat16() for k, v in t.items()})
    with pytest.warns(UserWarning, match="F32 in .*: all are stored as in .*half"):
        made = merged(tmp_path, tuned, base=half, alpha=["0.5"])
    assert {t.dtype for t in weights(made).values()} == {torch.bfloat16}
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"
    name = "encoder.layer.0.output.dense.weight"
    mean = (weights(half)[name].float() + weights(tuned)[name]) / 2
    assert torch.equal(weights(made)[name], mean.bfloat16())  # one rounding


def test_shards_stay_as_the_tuned_model_has_them(base, tuned, tmp_path):
    from transformers import AutoModel

    sharded = shutil.copytree(tuned, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    AutoModel.from_pretrained(tuned).save_pretrained(sharded, max_shard_size="50KB")
    shards = {path.name for path in sharded.glob("*.safetensors")}
    made = merged(tmp_path, sharded, base=base, alpha=["1"])
    assert len(shards) > 1 and {path.name for path in made.glob("*.safetensors")} == shards
    assert torch.equal(vectors(made), vectors(tuned))
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert "total_size" not in index["metadata"]  # which was of the tuned model's dtype


def test_a_base_with_a_head_is_read_as_the_transformer_in_it(base, tuned, tmp_path):
    """As a model for masked words is on the hub: a level more, a head, old names, no pooler."""

    def with_head(tensors):
        old = {f"bert.{k}".replace("LayerNorm.weight", "LayerNorm.gamma"): t
               for k, t in tensors.items() if not k.startswith("pooler.")}  # fmt: skip
        return old | {"cls.predictions.bias": torch.zeros(320)}

    hub = changed(base, tmp_path / "hub", with_head)
    with pytest.warns(UserWarning) as said:
        made = weights(merged(tmp_path, tuned, base=hub, alpha=["0"]))
    assert {"left out (cls.predictions.bias", "no pooler"} == {
        part for part in ("left out (cls.predictions.bias", "no pooler")
        if any(part in str(warning.message) for warning in said)
    }  # fmt: skip
    b, t = weights(base), weights(tuned)
    assert all(torch.equal(made[k], (t if k.startswith("pooler.") else b)[k]) for k in made)


def without(name):
    return lambda tensors: {k: t for k, t in tensors.items() if k != name}


def longer(name):
    return lambda tensors: {**tensors, name: torch.cat([tensors[name]] * 2)}


@pytest.mark.parametrize(
    "change, named",
    [
        (without("encoder.layer.1.output.dense.weight"), "encoder.layer.1.output.dense.weight"),
        (longer(WORDS), rf"{WORDS} is \[320, 32\] in .*tuned and \[640, 32\] in .*other"),
        (
            lambda t: {**t, "encoder.layer.2.output.dense.weight": torch.zeros(32, 64)},
            "fewer layers: encoder.layer.2.output",
        ),
        (lambda t: {**t, WORDS: t[WORDS].to(torch.int8)}, f"{WORDS} is F32 in .*I8"),
        (lambda t: {**t, WORDS: t[WORDS] * float("nan")}, f"{WORDS} holds NaN or inf"),
    ],
    ids=["name", "shape", "layers", "dtype", "nan"],
)
def test_tensors_that_do_not_go_together_are_named(change, named, base, tuned, tmp_path):
    other = changed(base, tmp_path / "other", change)
    with pytest.raises(InputError, match=named):
        merged(tmp_path, tuned, base=other, alpha=["0.5"])
    assert not list(tmp_path.glob("*merged*"))  # nor half of it


def edited(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "edit, named",
    [
        (lambda d: edited(d / "rankpo_fast.json", pooling="mean"), "pooling: 'cls' in .*'mean'"),
        (lambda d: edited(d / "config.json", num_attention_heads=2), "num_attention_heads"),
        (lambda d: edited(d / "config.json", model_type="mistral", attention_bias=1), "model_type"),
        (lambda d: (d / "tokenizer.json").unlink() or (d / "tokenizer_config.json").unlink(),
         "no tokenizer there"),
    ],
    ids=["pooling", "heads", "family", "no-tokenizer"],
)  # fmt: skip
def test_models_that_read_otherwise_are_refused_by_what_differs(edit, named, base, tuned, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    edit(other)
    with pytest.raises(InputError, match=named):
        merged(tmp_path, tuned, base=other, alpha=["0.5"])


def test_tokenizers_that_number_tokens_otherwise_are_refused(base, tuned, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"models differ in token \d+: 'a' in .*'b' in"):
        merged(tmp_path, tuned, base=other, alpha=["0.5"])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--alpha", "0:1"], "START:STOP:STEP, got '0:1'"),
        (["--alpha", "1:0:0.1"], "START <= STOP"),
        (["--alpha", "0:1:1e-9"], "1,000 at most"),
        (["--alpha", "nan"], "got 'nan'"),
        (["--alpha", "1", "--weights", "1", "2"], "2 values for 1 models"),
        ([], "--alpha says how far"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(flags, named, base, tuned, tmp_path, capsys):
    argv = ["merge", "--base", base, "--model", tuned, "--output_dir", tmp_path / "out", *flags]
    assert main(list(map(str, argv))) == 2
    assert named in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["tuned", "tuned/new", "base"])
def test_an_output_directory_on_an_input_is_refused(where, base, tuned, capsys):
    before = sorted(base.parent.rglob("*"))
    argv = ["merge", "--base", base, "--model", tuned, "--alpha", "1", "--output_dir",
            base.parent / where]  # fmt: skip
    assert main(list(map(str, argv))) == 2
    assert "--output_dir" in capsys.readouterr().err
    assert sorted(base.parent.rglob("*")) == before


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir, tmp_path_factory) -> tuple[Path, Path]:
    """The directory of a model trained with LoRA (its adapter in adapter/), and its base."""
    from rankpo_fast.config import ModelConfig

    config = ModelConfig(str(tiny_llama_dir), lora_rank=2, pooling="last", bf16=False)
    encoder = load_encoder(config, device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    directory = tmp_path_factory.mktemp("lora") / "model"
    encoder.save(directory)
    return directory, tiny_llama_dir


def test_a_scaled_adapter_is_the_merged_whole_model(adapter, tmp_path):
    directory, base = adapter
    scaled = merged(tmp_path, directory / "adapter", alpha=["0.5"])
    whole = merged(tmp_path, directory, base=base, alpha=["0.5"], output_dir=str(tmp_path / "w"))
    assert not (whole / "adapter").exists()
    torch.testing.assert_close(vectors(scaled), vectors(whole), rtol=1e-4, atol=1e-5)
    assert (vectors(whole) - vectors(directory)).norm() > 1e-3


def test_an_adapter_at_alpha_1_is_itself_and_0_is_refused(adapter, tmp_path):
    directory = adapter[0] / "adapter"
    made = merged(tmp_path, directory, alpha=["1"])
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (made, directory))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    with pytest.raises(InputError, match="--alpha 0: .* this is its base"):
        merged(tmp_path, directory, alpha=["0:1:0.5"], output_dir=str(tmp_path / "grid"))


def test_an_adapter_that_no_factor_scales_is_refused(adapter, tmp_path):
    other = shutil.copytree(adapter[0] / "adapter", tmp_path / "dora")
    tensors = load_file(other / "adapter_model.safetensors")
    name = next(iter(tensors)).replace(".lora_A", ".lora_magnitude_vector")
    save_file({**tensors, name: torch.ones(32)}, other / "adapter_model.safetensors")
    with pytest.raises(InputError, match="lora_magnitude_vector.* is not scaled"):
        merged(tmp_path, other, alpha=["0.5"])
