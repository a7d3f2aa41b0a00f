"""Which way to train fits which model on which GPU, as `rankpo-fast plan` finds it.

    python -m bench.plans            the table of docs/plan.md, in Markdown

Of published shapes; no weights are needed, and none of these GPUs. Without compiled layers, whose
gain is the coarsest part of the model.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from rankpo_fast.config import ModelConfig
from rankpo_fast.plan.gpus import GIB, GPUS
from rankpo_fast.plan.search import Asked, Plan, find

ROWS, NEGATIVES, QUERY, PASSAGE = 32, 5, 256, 1024


def qwen3(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": vocabulary, "max_position_embeddings": 32768,
    }  # fmt: skip


def llama(hidden: int, inner: int, layers: int, heads: int, dims: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": dims, "vocab_size": 128256, "max_position_embeddings": 131072,
    }  # fmt: skip


SHAPES = {
    "Qwen3-Embedding-0.6B": qwen3(1024, 3072, 28, 16, 151669),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 64),
    "Qwen3-Embedding-4B": qwen3(2560, 9728, 36, 32, 151665),
    "Qwen3-Embedding-8B": qwen3(4096, 12288, 36, 32, 151665),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 128),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64, 151936),
}


def plan(shape: dict[str, Any], gpu: str) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        model = ModelConfig(
            model_name_or_path=folder, max_query_length=QUERY, max_passage_length=PASSAGE,
            torch_compile=False,
        )  # fmt: skip
        return find(Asked(model, GPUS[gpu], ROWS, NEGATIVES))


def cell(found: Plan) -> str:
    best = found.best
    if not found.fits:
        return f"{-best.free / GIB:,.1f} GiB too much"
    levers = best.levers
    how = {False: "", True: ", checkpointed", "selective": ", selective"}
    moved = "".join(f", {what} on the host" for what in levers.offload)
    way = levers.name.removeprefix("all weights in ").removesuffix(", adamw")
    return f"{way}{how[levers.gradient_checkpointing]}{moved}; {_rounded(best.tokens_per_second)}"


def _rounded(speed: float) -> str:
    """To two digits: it is a model."""
    return f"{float(f'{speed:.2g}'):,.0f}"


def main() -> None:
    heads = [f"{gpu.name}, {size} GB" for size, gpu in GPUS.items()]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, shape in SHAPES.items():
        print(f"| {name} | {' | '.join(cell(plan(shape, gpu)) for gpu in GPUS)} |", flush=True)


if __name__ == "__main__":
    main()
