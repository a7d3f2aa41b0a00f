"""Figures of several seeds, as tables have them."""

import statistics
from collections.abc import Sequence


def difference(apart: Sequence[float]) -> str:
    """The mean of differences seed by seed, with its standard error: "+0.012 ± 0.003"."""
    mean = f"{statistics.fmean(apart):+.3f}"
    if len(apart) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(apart) / len(apart) ** 0.5:.3f}"
