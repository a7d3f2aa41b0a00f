"""Is what a plan predicts what a training takes? Bytes of both, for small models on this CPU.

    python -m bench.planned

Predicted from config.json alone, by `rankpo_fast.plan`, on fewer layers and other numbers of
tokens; measured on the real encoder, its gradients, its optimizer, and a micro-batch that goes
through it forward and backward.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankpo_fast.config import ModelConfig, TrainingConfig
from rankpo_fast.data.packing import MicroBatch, pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.model.attention import KERNELS, Kernel
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.lora import add_lora, keep_four_bits
from rankpo_fast.model.precision import zero_gradient
from rankpo_fast.model.reshape import freeze
from rankpo_fast.model.settings import EncoderSettings
from rankpo_fast.plan.count import count, run_micro_batch
from rankpo_fast.plan.counter import Meter
from rankpo_fast.plan.skeleton import read_shape
from rankpo_fast.train.optim import make_optimizer

LENGTH, TEXTS, LAYERS = 48, 7, 5
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "num_hidden_layers": LAYERS}  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}
BERT = {"model_type": "bert", **SIZES, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}  # fmt: skip
LEVERS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, bf16 products": {"bf16": True},
    "fp32, checkpointed": {"gradient_checkpointing": True},
    "bf16 weights": {"weights_dtype": "bf16", "bf16": True},
    "LoRA on bf16": {"weights_dtype": "bf16", "lora_rank": 4, "bf16": True},
    "QLoRA": {"weights_dtype": "nf4", "lora_rank": 4, "bf16": True},
    "QLoRA, checkpointed": {
        "weights_dtype": "nf4", "lora_rank": 4, "bf16": True, "gradient_checkpointing": True,
    },
    "embeddings frozen": {"freeze_embeddings": True},
    "two layers frozen": {"freeze_layers": 2},
}  # fmt: skip
PARTS = ("weights", "adapters", "gradients", "graph", "peak")


@dataclass(frozen=True)
class Comparison:
    """Bytes by part, of an encoder with its levers."""

    name: str
    predicted: dict[str, float]
    measured: dict[str, float]

    def errors(self) -> dict[str, float]:
        """Relative ones."""
        return {
            part: abs(self.predicted[part] - real) / real
            for part, real in self.measured.items()
            if real
        }


def compare(
    name: str, config: Mapping[str, Any], levers: Mapping[str, Any], optim: str = "adamw"
) -> Comparison:
    """Of a model by the contents of its config.json, and levers by their flags."""
    levers = {"bf16": False, "gradient_checkpointing": False} | dict(levers)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)))
        model = ModelConfig(
            model_name_or_path=folder, max_query_length=LENGTH, max_passage_length=LENGTH, **levers
        )
        shape = read_shape(model)
        found = count(shape, model, None, bf16=model.bf16 is True)
        tokens = TEXTS * LENGTH
        predicted = {
            "weights": found.weights, "adapters": found.adapters, "gradients": found.gradients,
            f"states {optim}": found.states[optim] + (found.host_states if "paged" in optim else 0),
            "graph": found.graph.at(tokens), "peak": found.peak(tokens),
        }  # fmt: skip
        return Comparison(name, predicted, _measured(model, shape.pooling, optim))


def _measured(model: ModelConfig, pooling: str, optim: str) -> dict[str, float]:
    encoder = real_encoder(model, pooling)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    states = _state_bytes(encoder, optim)
    for parameter in trained:
        parameter.grad = zero_gradient(parameter)
    batch = some_texts(TEXTS, LENGTH)
    run_micro_batch(encoder, batch, Meter())  # libraries set themselves up
    ran = run_micro_batch(encoder, batch, Meter())
    adapters = [p for name, p in encoder.named_parameters() if "lora_" in name]
    return {
        "weights": _bytes([*_tensors_of(encoder)]) - _bytes(adapters),
        "adapters": _bytes(adapters),
        "gradients": _bytes([p.grad for p in trained if p.grad is not None]),
        f"states {optim}": states,
        "graph": ran.bytes["graph"],
        "peak": ran.peak,
    }


def real_encoder(
    model: ModelConfig, pooling: str, kernel: Kernel = KERNELS[-1], device: str = "cpu"
) -> Encoder:
    """With weights, by the libraries that the levers come from."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model.model_name_or_path)
    config.use_cache = False
    whole = torch.float32 if model.weights_dtype == "fp32" else torch.bfloat16
    softcap = getattr(config, "attn_logit_softcapping", None)
    with torch.device(device):
        backbone = AutoModel.from_config(
            config, dtype=whole, attn_implementation="eager" if softcap else None
        )
    if model.weights_dtype == "nf4":
        _quantise(backbone)
    if model.lora_rank is not None:
        add_lora(backbone, model)
    freeze(backbone, model)
    settings = EncoderSettings(pooling, "", "", LENGTH, LENGTH)
    no_tokenizer: Any = None
    encoder = Encoder(backbone, no_tokenizer, settings, bf16=model.bf16 is True)
    encoder.use_kernel(kernel)
    encoder.layers.checkpoint(bool(model.gradient_checkpointing))
    return encoder.to(device).train()


def _quantise(backbone: nn.Module) -> None:
    """Its linear layers by bitsandbytes, in place."""
    import bitsandbytes as bnb

    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                layer = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None,
                    compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer.to(torch.bfloat16).to("cpu"))
    keep_four_bits(backbone)


def _state_bytes(encoder: Encoder, optim: Any) -> float:
    config = TrainingConfig(output_dir="none", optim=optim)
    optimizer = make_optimizer(encoder, config)
    states = [
        tensor
        for parameter in optimizer.parameters
        for name, tensor in optimizer.state_of(parameter).items()
        if name != "step"
    ]
    return _bytes(states)


def _tensors_of(encoder: nn.Module) -> Iterator[Tensor]:
    yield from encoder.parameters()
    yield from encoder.buffers()
    for module in encoder.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.state2.absmax)


def _bytes(tensors: Sequence[Tensor]) -> float:
    """Of storages, each counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return float(sum(sizes.values()))


def some_texts(texts: int, length: int) -> MicroBatch:
    """Of random tokens."""
    ids = torch.randint(4, 320, (texts * length,), dtype=torch.int32)
    offsets = torch.arange(texts + 1) * length
    return pack(TokenTable(ids, offsets, truncated=0), torch.arange(texts))


def table(comparisons: Sequence[Comparison]) -> str:
    """In Markdown: predicted and measured KiB, and the largest error in percent."""
    heads = [*PARTS, "states"]
    lines = [f"| | {' | '.join(heads)} | largest error |", "|---|" + "---:|" * (len(heads) + 1)]
    for one in comparisons:
        [states] = [part for part in one.measured if part.startswith("states")]
        cells = [
            f"{one.predicted[part] / 2**10:,.1f} / {one.measured[part] / 2**10:,.1f}"
            for part in (*PARTS, states)
        ]
        worst = max(one.errors().values())
        lines.append(f"| {one.name} | {' | '.join(cells)} | {worst:.2%} |")
    return "\n".join(lines)


def main() -> int:
    found = [compare(f"Llama, {name}", LLAMA, levers) for name, levers in LEVERS.items()]
    found += [compare(f"BERT, {name}", BERT, LEVERS[name]) for name in list(LEVERS)[:3]]
    found += [
        compare(f"Llama, fp32, {optim}", LLAMA, {}, optim)
        for optim in ("adamw_8bit", "adamw_4bit", "adamw_fp8", "paged_adamw_8bit", "muon")
    ]
    found.append(
        compare("Llama, bf16 weights, adamw_8bit", LLAMA, LEVERS["bf16 weights"], "adamw_8bit")
    )
    print(f"KiB, predicted / measured; {LAYERS} layers, {TEXTS} texts of {LENGTH} tokens\n")
    print(table(found))
    return int(any(max(one.errors().values()) > 0.05 for one in found))


if __name__ == "__main__":
    sys.exit(main())
