"""What rounds came to: a table with a column a round, and a picture of the same figures."""

from collections.abc import Sequence
from io import BytesIO

from rankpo_fast.rounds.run import MODEL, ROWS, START, Settings, Steps

# Okabe and Ito's colours, told apart with any colour vision; the marks differ as well.
LOOKS = [("#0072B2", "o"), ("#D55E00", "D"), ("#009E73", "P"), ("#E69F00", "s"), ("#CC79A7", "v"),
         ("#56B4E9", "X"), ("#6E6E6E", "^"), ("#000000", "h")]  # fmt: skip


def columns(settings: Settings, steps: Steps) -> dict[str, dict[str, float]]:
    """Of the start and each round what was mined, and the figures, by name."""
    found = {START: steps[START]["figures"]} if START in steps else {}
    for number in settings.numbers:
        of_round: dict[str, float] = {}
        if number > 0:
            mined = steps[f"round-{number}/{ROWS}"]
            of_round = {
                "negatives a row": mined["negatives"] / mined["rows"],
                "of them mined now": mined["mined"] / mined["rows"],
            }
        figures = steps[f"round-{number}/{MODEL}"].get("figures", {})
        found[f"round {number}"] = of_round | figures
    return found


def as_markdown(settings: Settings, steps: Steps, figure: str | None) -> str:
    table = columns(settings, steps)
    names = list(dict.fromkeys(name for column in table.values() for name in column))
    lines = [
        f"# {settings.rounds.rounds} rounds, {settings.rounds.mode}",
        "",
        f"Negatives by --method {settings.rounds.method}, ranks {settings.rounds.search_range}.",
        "",
        f"| | {' | '.join(table)} |",
        f"|---|{'---|' * len(table)}",
    ]
    for name in names:
        values = (_shown(name, column.get(name)) for column in table.values())
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines.append("")
    for number in settings.numbers:
        if number > 0:
            lines.append(f"* Round {number}: {steps[f'round-{number}/{ROWS}']['summary']}.")
    if figure is not None:
        lines += ["", f"![figures of each round]({figure})"]
    return "\n".join(lines) + "\n"


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if "now" in name or "row" in name else f"{value:.3f}"


def png(settings: Settings, steps: Steps) -> bytes:
    """Figures by round, a panel for each kind; there must be some."""
    from matplotlib.figure import Figure

    table = columns(settings, steps)
    kinds: dict[str, list[str]] = {}
    for name in [*table.values()][-1]:
        if "row" not in name and "now" not in name:
            kinds.setdefault(name.partition("@")[0], []).append(name)
    figure = Figure(figsize=(3.6 * len(kinds), 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (kind, names) in zip(panels, kinds.items(), strict=True):
        for name, (colour, mark) in zip(names, LOOKS * len(names), strict=False):
            places, values = _points(table, name)
            axes.plot(places, values, marker=mark, color=colour, linewidth=1, label=name)
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_xticks(range(len(table)), [name.removeprefix("round ") for name in table])
        axes.set_xlabel("round")
        axes.grid(color="#E8E8E8")
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
    written = BytesIO()
    figure.savefig(written, format="png", dpi=130)
    return written.getvalue()


def _points(table: dict[str, dict[str, float]], name: str) -> tuple[Sequence[int], Sequence[float]]:
    there = [(i, column[name]) for i, column in enumerate(table.values()) if name in column]
    return [i for i, _ in there], [value for _, value in there]
