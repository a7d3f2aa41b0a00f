"""A plan in words, as JSON, and as the command line that trains so."""

import shlex
from typing import Any

from rankpo_fast.plan.estimate import Estimate
from rankpo_fast.plan.gpus import (
    BANDWIDTH_SHARE,
    CONTEXT,
    EFFICIENCY,
    FLOAT8_SPEED,
    FRAGMENTATION,
    GIB,
)
from rankpo_fast.plan.search import Asked, Plan

PARTS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "micro-batch": "one micro-batch, forward and backward",
    "loss": "loss and vectors",
    "fragmentation": "lost between blocks (allowance)",
    "context": "CUDA (assumed)",
}


def as_json(plan: Plan) -> dict[str, Any]:
    """What `--json` prints."""
    best = plan.best
    return {
        "fits": plan.fits,
        "gpu": {"name": plan.asked.gpu.name, "bytes": round(plan.asked.gpu.bytes)},
        "method": best.levers.method,
        "flags": {k: list(v) if isinstance(v, tuple) else v for k, v in _flags(plan).items()},
        "bytes": {name: round(size) for name, size in best.parts.items()}
        | {"kept_graphs": round(best.graphs), "host": round(best.host)},
        "free_bytes": round(best.free),
        "graph_bytes_per_token": round(best.graph_per_token),
        "peak_bytes_per_token": round(best.peak_per_token),
        "max_tokens_per_micro_batch": best.max_tokens,
        "max_rows": best.max_rows,
        "tokens_per_second": best.tokens_per_second,
        "seconds_per_step": best.step_seconds,
        "speedup_of_torch_compile": plan.compiled,
        "proposals": []
        if plan.float8 is None
        else [{"flags": {"float8": True}, "speedup": plan.float8, "changes_results": True}],
        "assumptions": assumptions(plan),
        "passed_over": [_passed_json(one) for one in plan.passed],
        "command": command(plan),
    }


def _passed_json(one: Estimate) -> dict[str, Any]:
    return {
        "method": one.levers.method,
        "flags": {k: list(v) if isinstance(v, tuple) else v for k, v in one.levers.flags().items()},
        "fits": one.fits,
        "free_bytes": round(one.free),
        "tokens_per_second": one.tokens_per_second,
    }


def as_text(plan: Plan) -> str:
    best, gpu, batch = plan.best, plan.asked.gpu, plan.batch
    model = plan.asked.model
    lines = [
        f"{model.model_name_or_path} on {_gpus(plan)}",
        f"  {best.levers.name}, {_details(best)}",
        "",
        f"  {'GiB':>8}",
        *(f"  {best.parts[key] / GIB:8.2f}  {name}" for key, name in PARTS.items()),
        f"  {best.graphs / GIB:8.2f}  graphs of further micro-batches, kept",
        f"  {best.free / GIB:8.2f}  free",
        f"  {gpu.bytes / GIB:8.2f}  in all",
    ]
    if best.host:
        lines += [f"  {best.host / GIB:8.2f}  on the host"]
    if plan.fits:
        kept = best.kept_tokens / batch.tokens
        lines += [
            "",
            f"  a token takes {best.graph_per_token / 2**10:,.0f} KiB as a graph, "
            f"{best.peak_per_token / 2**10:,.0f} KiB in its backward pass",
            f"  largest micro-batch: {best.max_tokens:,} tokens; planned: {best.micro_batch:,}",
            f"  largest batch: {best.max_rows:,} rows of {batch.texts_of_row} texts",
            f"  a step of {batch.rows:,} rows: {batch.tokens:,} tokens, of {kept:.0%} the graph "
            f"is kept, the others are computed twice",
            f"  about {best.tokens_per_second:,.0f} tokens/s (a model, not a measurement)",
        ]
        lines += [f"  {line}" for line in _speedups(plan)]
    lines += ["", "  other ways to train:", *(f"    {_passed(plan, one)}" for one in plan.passed)]
    lines += ["", "  assumed:", *(f"    {line}" for line in assumptions(plan))]
    if plan.fits:
        lines += ["", command(plan)]
    return "\n".join(lines)


def _gpus(plan: Plan) -> str:
    asked = plan.asked
    one = f"{asked.gpu.name} ({asked.gpu.bytes / GIB:.1f} GiB)"
    if asked.processes == 1:
        return one
    return f"{asked.processes} of {one}, --shard {asked.shard}"


def _details(one: Estimate) -> str:
    how = {False: "not checkpointed", True: "checkpointed", "selective": "checkpointed selectively"}
    words = [f"layers {how[one.levers.gradient_checkpointing]}"]
    words += ["compiled"] if one.levers.torch_compile else []
    words += [f"{what} on the host" for what in one.levers.offload]
    return ", ".join(words)


def _speedups(plan: Plan) -> list[str]:
    lines = []
    if plan.compiled is not None:
        lines.append(f"--torch_compile makes it {plan.compiled:.2f} times as fast, after a slow "
                     f"start (a model: see below)")  # fmt: skip
    if plan.float8 is not None:
        lines.append(f"not chosen, as it changes results: --float8 true would make it "
                     f"{plan.float8:.2f} times as fast (a model: see below)")  # fmt: skip
    return lines


def _passed(plan: Plan, one: Estimate) -> str:
    what = f"{one.levers.name}, {_details(one)}"
    if not one.fits:
        return f"{what}: {-one.free / GIB:,.1f} GiB too much"
    ratio = one.tokens_per_second / plan.best.tokens_per_second
    return f"{what}: fits, {ratio:.2f} times as fast, but changes the training more"


def assumptions(plan: Plan) -> list[str]:
    gpu, batch, model = plan.asked.gpu, plan.batch, plan.asked.model
    half = model.bf16 is not False
    peak = gpu.bf16_flops if half else gpu.fp32_flops
    lines = [
        f"{gpu.name}: {peak / 1e12:,.0f} TFLOP/s {'bf16, dense' if half else 'fp32'}, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.link / 1e9:.0f} GB/s to the host (data sheet)",
        f"products at {EFFICIENCY:.0%} of that peak, all else at {BANDWIDTH_SHARE:.0%} of the "
        f"bandwidth, nothing in between",
        f"{CONTEXT / GIB:.1f} GiB for CUDA, {FRAGMENTATION:.0%} of what the lasting tensors leave "
        f"is lost between blocks",
        f"queries of {batch.query_length:,} and passages of {batch.passage_length:,} tokens, none "
        f"shorter; {batch.texts_of_row - 1} passages a row, none twice",
        "a flash-attention kernel; not Liger's kernels, which take less",
    ]
    if plan.best.levers.torch_compile:
        lines.append("compiled layers: what lies between two products is one kernel, which reads "
                     "once what comes in and writes once what is needed later; as much memory as "
                     "layers that are not compiled")  # fmt: skip
    if gpu.assumed:
        lines.append(gpu.assumed)
    if model.float8 or plan.float8 is not None:
        lines.append(f"--float8: products of linear layers {FLOAT8_SPEED:.0f} times as fast, once "
                     f"their operands have been read twice and half of them written")  # fmt: skip
    if model.trim_vocabulary:
        lines.append("--trim_vocabulary: which tokens the texts have is not known: all count")
    if plan.asked.processes > 1:
        lines.append("time between GPUs is not counted")
    return lines


# --- the command line ---


def _flags(plan: Plan) -> dict[str, Any]:
    """Those of a training that follows the plan, by name."""
    asked, flags = plan.asked, plan.best.levers.flags()
    flags = asked.model.changed() | flags | {"max_tokens_per_micro_batch": plan.best.micro_batch}
    flags["per_device_train_batch_size"] = asked.rows
    flags["num_negatives"] = asked.negatives
    if asked.shard != "none":
        flags["shard"] = asked.shard
    return flags


def command(plan: Plan) -> str:
    """To paste: what is missing of it stands in capitals."""
    words = ["rankpo-fast", "contrastive"]
    if plan.asked.processes > 1:
        words = ["torchrun", "--nproc_per_node", str(plan.asked.processes), "-m",
                 "rankpo_fast.cli", "contrastive"]  # fmt: skip
    for name, value in _flags(plan).items():
        values = value if isinstance(value, list | tuple) else [value]
        texts = [str(x).lower() if isinstance(x, bool) else str(x) for x in values]
        words += [f"--{name}", *texts]
    return shlex.join(words) + " --train_data ROWS.jsonl --output_dir OUT"


def shortage(plan: Plan, advice: list[str]) -> str:
    """Why there is no plan."""
    best = plan.best
    asked: Asked = plan.asked
    way = "" if asked.method is None else f" with --method {asked.method}"
    fits = f"; what would fit: {'; '.join(advice)}" if advice else ""
    return (
        f"--gpu: {asked.model.model_name_or_path} does not fit on {_gpus(plan)}{way}: "
        f"{-best.free / GIB:,.1f} GiB too much even with {best.levers.name}, {_details(best)}{fits}"
    )
