"""What a run says before it begins: what is trained, on what, where, and from when on."""

from collections.abc import Mapping

import torch

from rankpo_fast.model.encoder import Encoder
from rankpo_fast.threads import describe_threads
from rankpo_fast.train.arithmetic import native_backend
from rankpo_fast.train.reporters import chosen
from rankpo_fast.train.run import Run


def introduce(run: Run, encoder: Encoder, about: Mapping[str, str]) -> None:
    """Say what is going to happen, once and visibly; `about` goes before what any run says."""
    settings = encoder.settings
    parameters = _parameters(encoder)
    lengths = f"{settings.max_query_length:,} and {settings.max_passage_length:,}"
    lines = {
        **about,
        "model": f"{run.model.model_name_or_path}, {parameters}, "
        f"{settings.pooling} pooling, up to {lengths} tokens",
        "device": f"{_name(run.device)}, {run.precision}"
        + (f", on each of {run.ranks.size} ranks" if run.ranks.size > 1 else "")
        + (f", --shard {run.training.shard}" if run.sharded else ""),
        "losses": "Triton and cuBLAS" if run.device.type == "cuda" else native_backend(),
        "attention": f"{encoder.attention}, texts {'packed' if encoder.packed else 'padded'}",
    }
    if encoder.layers.mlp_chunk is not None:
        lines["feed-forward"] = f"{encoder.layers.mlp_chunk:,} tokens at once, computed again"
    if encoder.layers.offloaded:
        lines["offload"] = "what goes into layers lies on the host"
    if encoder.trimmed:
        lines["vocabulary"] = encoder.trimmed
    if reporters := chosen(run.training.report_to):
        lines["reports"] = f"metrics.jsonl, {', '.join(reporters)}"
        if run.checkpoint is not None and {*reporters} - {"tensorboard"}:
            lines["reports"] += " (but for tensorboard as a new run there)"
    if run.checkpoint is not None:
        lines["resume"] = f"{run.checkpoint.path}, after step {run.checkpoint.step:,}"
    run.ranks.say(f"rankpo-fast {run.stage}")
    width = max(map(len, lines))
    for name, text in lines.items():
        run.ranks.say(f"  {name:{width}} {text}")


def _parameters(encoder: Encoder) -> str:
    """How many are trained, of how many."""
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    frozen = [p for p in encoder.parameters() if not p.requires_grad]
    if encoder.lora is not None:
        kind = "4 bits" if encoder.lora.four_bits else str(encoder.backbone.dtype)[len("torch.") :]
        return f"an adapter of {trained:,} parameters beside weights of {kind}"
    return f"{trained:,} parameters" + (f", {len(frozen)} tensors frozen" if frozen else "")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({describe_threads()})"
