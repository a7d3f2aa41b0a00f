"""What a layer keeps of a token for the backward pass, with each lever of activation memory, in
bytes of live tensors; and the time of forward and backward, that without any being 1. On the CPU.

    python examples/activation_memory.py [bf16] [bert-base ...]
"""

import sys
import time

import torch
import transformers

from rankpo_fast.data.packing import pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.model.attention import KERNELS
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.layers import Checkpointing
from rankpo_fast.model.settings import EncoderSettings
from rankpo_fast.train.meters import Host

MODELS = {
    "Llama-3.2-1B": ("Llama", 2048, 8192, {"num_attention_heads": 32, "num_key_value_heads": 8}),
    "Qwen3-0.6B": ("Qwen3", 1024, 3072, {"num_attention_heads": 16, "num_key_value_heads": 8}),
    "bert-base": ("Bert", 768, 3072, {"num_attention_heads": 12}),
    "ModernBERT-base": ("ModernBert", 768, 1152, {"num_attention_heads": 12}),
}
LEVERS: dict[str, tuple[Checkpointing, int | None]] = {
    "none": (False, None), "mlp_chunk 128": (False, 128), "selective": ("selective", None),
    "full": (True, None), "full, mlp_chunk 128": (True, 128),
}  # fmt: skip
LENGTH, TEXTS = 128, (2, 4)  # tokens of a text, texts; what weights take beside both is left out
FEW, MANY = 1, 3  # layers; what is kept beside them is left out


def measured(encoder: Encoder) -> tuple[float, float]:
    """KiB of a token's graph, and seconds of forward and backward."""
    held = []
    for texts in TEXTS:
        offsets = torch.arange(texts + 1) * LENGTH
        ids = torch.arange(texts * LENGTH, dtype=torch.int32) % 300 + 4
        batch, host = pack(TokenTable(ids, offsets, truncated=0), torch.arange(texts)), Host()
        with host:
            vectors = encoder(batch)
            held.append(host.held())
        del vectors
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        encoder(batch).sum().backward()
        seconds.append(time.perf_counter() - began)
    return (held[1] - held[0]) / (TEXTS[1] - TEXTS[0]) / LENGTH / 2**10, min(seconds)


def main() -> None:
    bf16 = "bf16" in sys.argv[1:]
    for name in [name for name in sys.argv[1:] if name in MODELS] or MODELS:
        family, hidden, within, more = MODELS[name]
        sizes = {"hidden_size": hidden, "intermediate_size": within, "vocab_size": 320, **more}
        if family == "ModernBert":
            sizes |= {"cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
        results: dict[str, list[tuple[float, float]]] = {lever: [] for lever in LEVERS}
        for layers in (FEW, MANY):
            config = getattr(transformers, f"{family}Config")(
                num_hidden_layers=layers, pad_token_id=0, **sizes
            )
            backbone = transformers.AutoModel.from_config(config, attn_implementation="sdpa")
            settings = EncoderSettings("mean", "", "", 512, 512)
            encoder = Encoder(backbone, None, settings, bf16=bf16).train()  # type: ignore[arg-type]
            encoder.use_kernel(KERNELS[-1])
            for lever, (way, chunk) in LEVERS.items():
                encoder.layers.chunk(chunk)
                encoder.layers.checkpoint(way)
                results[lever].append(measured(encoder))
        plain = results["none"][1][1] - results["none"][0][1]
        for lever, ((few, early), (many, late)) in results.items():
            size, seconds = (many - few) / (MANY - FEW), late - early
            print(f"{name:16} {lever:20} {size:8.1f} KiB a token and layer {seconds / plain:6.2f}")


if __name__ == "__main__":
    main()
