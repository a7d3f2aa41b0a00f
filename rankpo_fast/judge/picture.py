"""The report as one picture: what verdicts follow besides the texts, how they end, how sure."""

from collections.abc import Mapping
from io import BytesIO
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rankpo_fast.judge.report import p_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which can be told apart with any colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E", "#000000"]
GREY = "#6E6E6E"
DPI = 130
SHARES = {
    "first_shown_preferred": "the passage\nshown first",
    "longer_preferred": "the longer\npassage",
    "higher_ranked_preferred": "the one ranked\nhigher by the model",
}
ENDS = {"one verdict": "#0072B2", "flipped with the order": "#D55E00", "tie": "#E69F00",
        "no verdict": "#BBBBBB"}  # fmt: skip


def png(figures: Mapping[str, Any]) -> bytes:
    from matplotlib.figure import Figure

    judges = figures["judges"]
    shares = figures["mode"] != "grade"
    figure = Figure(figsize=(11, 4.2 + 0.25 * len(judges)), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    if shares:
        _draw_shares(axes[0], judges)
    else:
        _draw_grades(axes[0], judges)
    _draw_ends(axes[1], judges, figures["mode"])
    _draw_confidence(axes[2], judges)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle(fill(title(figures), 110), x=0.01, ha="left", fontsize=11)
    if len(judges) > 1:
        handles = [axes[2].plot([], [], color=COLOURS[i % len(COLOURS)], label=name)[0]
                   for i, name in enumerate(judges)]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    written = BytesIO()
    figure.savefig(written, format="png", dpi=DPI)
    return written.getvalue()


def title(figures: Mapping[str, Any]) -> str:
    """What stands out, of each judge and of them together."""
    said = []
    for name, one in figures["judges"].items():
        first, flipped = one.get("first_shown_preferred"), one.get("flipped")
        words = f"{name}: {one['answers']:,} answers"
        if first is not None:
            words += f", the passage shown first preferred in {first['share']:.0%}"
            words += f" ({p_value(first['p'])})"
        if flipped is not None:
            words += f", {flipped['share']:.0%} flipped"
        if one["cost"] is not None:
            words += f", cost {one['cost']:,.2f}"
        said.append(words)
    alike = figures.get("agreement")
    if alike is not None and alike["alpha"] is not None:
        said.append(f"Krippendorff's alpha {alike['alpha']:.2f}")
    return ". ".join(said)


def _draw_shares(axes: "Axes", judges: Mapping[str, Any]) -> None:
    step = 0.6 / max(len(judges), 1)
    for number, one in enumerate(judges.values()):
        for height, name in enumerate(SHARES):
            found = one.get(name)
            if found is None:
                continue
            y = height + (number - (len(judges) - 1) / 2) * step
            low, high = found["share"] - found["low"], found["high"] - found["share"]
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar(found["share"], y, xerr=[[low], [high]], fmt="o", color=colour,
                          capsize=3)  # fmt: skip
            axes.annotate(f"{found['count']:,} of {found['of']:,}", (found["share"], y),
                          (0, 7), textcoords="offset points", ha="center", fontsize=8,
                          color=GREY)  # fmt: skip
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(SHARES)), list(SHARES.values()))
    axes.set_ylim(len(SHARES) - 0.5, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of verdicts for it, with its 95 % interval")
    axes.set_title("Preferred was ...", loc="left", fontsize=10)


def _draw_grades(axes: "Axes", judges: Mapping[str, Any]) -> None:
    width = 0.8 / max(len(judges), 1)
    for number, one in enumerate(judges.values()):
        counts = [one["grades"].get(str(grade), 0) for grade in range(4)]
        places = [grade + (number - (len(judges) - 1) / 2) * width for grade in range(4)]
        axes.bar(places, counts, width, color=COLOURS[number % len(COLOURS)])
    axes.set_xticks(range(4))
    axes.set_xlabel("grade")
    axes.set_ylabel("passages")
    axes.set_title("Grades", loc="left", fontsize=10)


def _draw_ends(axes: "Axes", judges: Mapping[str, Any], mode: str) -> None:
    """A bar a judge: of its pairs, or of its answers where no order can turn a verdict."""
    labels = []
    for height, (name, one) in enumerate(judges.items()):
        none = sum(one["without_verdict"].values())
        flipped = one.get("flipped")
        if flipped is None:
            parsed = one["answers"] - none - one.get("ties", 0)
            counts = [parsed, 0, one.get("ties", 0), none]
            unit = "answers"
        else:
            ties = one.get("ties", 0)
            counts = [flipped["of"] - flipped["count"] - ties, flipped["count"], ties, none]
            unit = "pairs"
        left = 0.0
        for count, (end, colour) in zip(counts, ENDS.items(), strict=True):
            part = count / max(sum(counts), 1)
            axes.barh(height, part, left=left, color=colour, height=0.5,
                      label=end if height == 0 else None)  # fmt: skip
            if part > 0.04:
                axes.text(left + part / 2, height, f"{part:.0%}", ha="center", va="center",
                          fontsize=8, color="white")  # fmt: skip
            left += part
        labels.append(f"{name}\n{sum(counts):,} {unit}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.2, -0.8)
    axes.set_xlim(0, 1)
    axes.set_title("Verdicts end as", loc="left", fontsize=10)
    axes.legend(loc="lower left", fontsize=8, frameon=False)


def _draw_confidence(axes: "Axes", judges: Mapping[str, Any]) -> None:
    drawn = False
    for number, one in enumerate(judges.values()):
        found = one.get("confidence")
        if found is None:
            continue
        drawn = True
        bins = found["histogram"]
        edges = [100 * i / len(bins) for i in range(len(bins) + 1)]
        shares = [count / found["of"] for count in bins]
        axes.stairs(shares, edges, color=COLOURS[number % len(COLOURS)],
                    fill=len(judges) == 1, linewidth=1.5)  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share of answers")
    axes.set_title("Confidence" if drawn else "No confidence was stated", loc="left", fontsize=10)
