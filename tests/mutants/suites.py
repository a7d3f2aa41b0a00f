"""The tests that should notice, as pytest's arguments; what one area alone asks stands there."""


def of(file: str, names: str) -> tuple[str, ...]:
    """The tests with such names in a file."""
    return (file, "-k", names)


def triton(names: str) -> tuple[str, ...]:
    """InfoNCE in Triton."""
    both = (f"tests/kernels/test_triton_info_nce{more}.py" for more in ("", "_edges"))
    return (*both, "-k", names)


def chunked(names: str) -> tuple[str, ...]:
    """InfoNCE in chunks of plain torch, with its native rows and without."""
    return of("tests/kernels/test_chunked.py", names)


def info_nce(names: str) -> tuple[str, ...]:
    """InfoNCE by its public function."""
    files = (f"tests/ops/test_info_nce{more}.py" for more in ("", "_options", "_peers", "_op"))
    return (*files, "-k", names)


def in_batch(names: str) -> tuple[str, ...]:
    """In-batch RankPO and SigLIP by their public functions."""
    return of("tests/ops/test_in_batch.py", names)


def rankpo(names: str) -> tuple[str, ...]:
    """RankPO over pairs by its public function."""
    return of("tests/ops/test_rankpo.py", names)


def ranks(names: str) -> tuple[str, ...]:
    """The losses over several ranks."""
    return of("tests/ops/test_ranks.py", names)


def bench(name: str, names: str) -> tuple[str, ...]:
    """The bench."""
    return of(f"tests/bench/test_{name}.py", names)


STREAMED = "tests/kernels/test_triton_streamed.py"
TRITON_OPTIONS = triton("options_in_fp32")
FAR_APART = triton("too_far or zero_vector")
FILTER = triton("filter")
MEMORY = triton("outside")
CHUNKED_OPTIONS = chunked("options_in_fp64 or options_in_fp32")
RANKS_OPTIONS = ranks("every_option and 2-")
RANKS_IN_TRITON = ranks("triton and 2")
PAIRS = rankpo("gates or upstream or extreme or nan")
