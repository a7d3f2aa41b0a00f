"""A plan as a picture: of every way to train a bar of what it takes, beside the GPU's memory."""

from io import BytesIO

from rankpo_fast.plan.estimate import Estimate
from rankpo_fast.plan.gpus import GIB
from rankpo_fast.plan.report import PARTS
from rankpo_fast.plan.search import Plan

# Okabe and Ito's colours, which can be told apart with any colour vision.
COLOURS = ["#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#BBBBBB", "#6E6E6E"]
KEPT = "#FBE3B5"
DPI = 130


def png(plan: Plan) -> bytes:
    from matplotlib.figure import Figure

    ways = [plan.best, *plan.passed]
    figure = Figure(figsize=(9.5, 1.6 + 0.5 * len(ways)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(ways)
    for (part, name), colour in zip(PARTS.items(), COLOURS, strict=True):
        sizes = [one.parts[part] / GIB for one in ways]
        axes.barh(range(len(ways)), sizes, left=left, color=colour, label=name, height=0.65)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    graphs = [one.graphs / GIB for one in ways]
    axes.barh(range(len(ways)), graphs, left=left, color=KEPT, height=0.65,
              label="graphs that are kept where there is room")  # fmt: skip
    size = plan.asked.gpu.bytes / GIB
    axes.axvline(size, color="black", linewidth=1.2)
    labels = [_label(one) for one in ways]
    axes.set_yticks(range(len(ways)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05 * max(size, *(a + b for a, b in zip(left, graphs, strict=True))))
    axes.set_xlabel(f"GiB; the line: {plan.asked.gpu.name}, {size:.1f}")
    name = plan.asked.model.model_name_or_path.rstrip("/").rpartition("/")[2]
    found = plan.best.levers.name if plan.fits else "nothing fits"
    axes.set_title(f"{name} on {plan.asked.gpu.name}: {found}", loc="left", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    written = BytesIO()
    figure.savefig(written, format="png", dpi=DPI)
    return written.getvalue()


def _label(one: Estimate) -> str:
    speed = f"{one.tokens_per_second:,.0f} tokens/s (model)" if one.fits else "does not fit"
    moved = ", compiled" * one.levers.torch_compile
    moved += "".join(f", {what} on the host" for what in one.levers.offload)
    return f"{one.levers.name}{moved}\n{speed}"
