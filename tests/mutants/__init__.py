"""Known ways to break the code, one file an area, and a runner of the tests that should notice."""

from mutants import (
    bench_measure,
    bench_report,
    bench_training,
    chunked_info_nce,
    in_batch,
    integrations,
    objective,
    ops,
    rankpo,
    ranks,
    training,
    triton_gradients,
    triton_info_nce,
    triton_kept,
    triton_scores,
    triton_slopes,
    triton_streamed,
)

AREAS = [
    triton_scores,
    triton_gradients,
    triton_streamed,
    triton_kept,
    triton_slopes,
    triton_info_nce,
    objective,
    chunked_info_nce,
    in_batch,
    rankpo,
    ops,
    ranks,
    training,
    integrations,
    bench_measure,
    bench_training,
    bench_report,
]
MUTANTS = [mutant for area in AREAS for mutant in area.MUTANTS]
