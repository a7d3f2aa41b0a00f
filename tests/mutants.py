"""Do the tests notice? Breaks a copy of the code in known ways and runs the tests that should see.

    python tests/mutants.py [name ...]

Prints what caught each mutant; exits with 1 if one survived. Not part of `make test`: each takes as
long as its tests take to fail.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "kernels/rankpo_kernels/"
CHUNKED, OBJECTIVE = KERNELS + "chunked.py", KERNELS + "objective.py"
SCORES, ROWS = KERNELS + "gpu/scores.py", KERNELS + "gpu/rows.py"
PRODUCTS, LAUNCHER = KERNELS + "gpu/products.py", KERNELS + "gpu/info_nce.py"
OPS, NATIVE = "rankpo_fast/ops/info_nce.py", "kernels/native/rows.cpp"
GPU_PAIRS, NATIVE_PAIRS = KERNELS + "gpu/pairs.py", "kernels/native/pairs.cpp"


def of(file: str, names: str) -> tuple[str, ...]:
    """pytest's arguments for the tests with such names."""
    return (file, "-k", names)


def gpu(names: str) -> tuple[str, ...]:
    return of("tests/kernels/test_gpu_info_nce.py", names)


OPTIONS = gpu("options_in_fp32")
FAR_APART = gpu("too_far_apart or zero_vector")
SMALL_CHUNKS = gpu("chunks_smaller or summed_beforehand")
FILTER = gpu("filter")
MEMORY = gpu("outside")
CPU = of("tests/kernels/test_chunked.py", "options_in_fp64 or options_in_fp32")
CPU_CHUNKS = of("tests/ops/test_info_nce.py", "gates and nothing-round and float32 and native")
OPS_GRADIENTS = of("tests/ops/test_info_nce.py", "gradcheck")
PAIRS = of("tests/ops/test_rankpo.py", "gates or upstream or extreme or nan")
GROUPS = of("tests/ops/test_rankpo_group.py", "gates or padding or two_passages")
RANKED = of("tests/kernels/test_gpu_pairs.py", "gates or norms or nan or padding or outside")
SANITIZER = of("tests/kernels/test_sanitizer.py", "strays")


@dataclass(frozen=True)
class Mutant:
    """`old` in `file`, where it occurs once, becomes `new`; `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    # kernels/rankpo_kernels/gpu/scores.py
    Mutant(
        "label-is-a-negative", SCORES,
        "!= offs_n[None, :])",
        ">= 0)",
        OPTIONS,
    ),
    Mutant(
        "known-pairs-are-negatives", SCORES,
        "open_mn = open_mn & ~(same_mn",
        "open_mn = open_mn | (same_mn",
        OPTIONS,
    ),
    Mutant(
        "curated-are-not-exempt", SCORES,
        "if CURATED == 1:",
        "if CURATED == 3:",
        OPTIONS,
    ),
    Mutant(
        "curated-repel", SCORES,
        "if CURATED == 2:",
        "if CURATED == 3:",
        OPTIONS,
    ),
    Mutant(
        "columns-past-the-end", SCORES,
        "left_mn & mask_n[None, :]",
        "left_mn",
        OPTIONS,
    ),
    Mutant(
        "rows-past-the-end", SCORES,
        "left_mn & mask_m[:, None]",
        "left_mn",
        OPTIONS,
    ),
    Mutant(
        "no-last-row-stands-in", SCORES,
        "    safe_m, safe_n = tl.minimum(offs_m, R - 1), tl.minimum(offs_n, N - 1)\n    "
        "open_mn",
        "    safe_m, safe_n = offs_m, offs_n\n    open_mn",
        MEMORY,
    ),
    Mutant(
        "parts-merge-without-rescale", SCORES,
        "by = tl.exp(tl.load(plain.parts.top + at) - floor)",
        "by = tl.full(floor.shape, 1.0, tl.float32)",
        OPTIONS,
    ),
    Mutant(
        "reduce-without-rescale", SCORES,
        "by = tl.exp(tl.load(parts.top + at, mask=mask, other=0.0) - floor)",
        "by = tl.full(floor.shape, 1.0, tl.float32)",
        SMALL_CHUNKS,
    ),
    Mutant(
        "losses-forget-log1p", SCORES,
        "tl.where(one == 1.0, e, ",
        "tl.where(one == 1.0, 0.0, ",
        gpu("gates and converged and fp32"),
    ),
    Mutant(
        "weights-forgotten", SCORES,
        "pull *= tl.load(plain.weights_R + offs_m)",
        "pull *= 1.0",
        OPTIONS,
    ),
    Mutant(
        "stored-weights-forgotten", SCORES,
        "weight * _sigmoid(-gap)",
        "_sigmoid(-gap)",
        FAR_APART,
    ),
    Mutant(
        "overflow-not-mended", SCORES,
        "write_m = mask_m & (gap_m > OVER)",
        "write_m = mask_m & (gap_m > 1e9)",
        FAR_APART,
    ),
    Mutant(
        "overflow-without-factor", SCORES,
        "tl.exp(-SHIFT), pull)",
        "tl.exp(-SHIFT), 0.0)",
        FAR_APART,
    ),
    Mutant(
        "label-pulls-the-other-way", SCORES,
        "at_label_m = -pull_m",
        "at_label_m = pull_m",
        OPTIONS,
    ),
    Mutant(
        "filter-takes-more", SCORES,
        "mass_m > filter_mass",
        "mass_m > 2 * filter_mass",
        FILTER,
    ),
    Mutant(
        "filter-takes-labels", SCORES,
        " | holds_label",
        "",
        FILTER,
    ),
    Mutant(
        "filter-takes-nan", SCORES,
        "(mass_m != mass_m)",
        "(mass_m < 0)",
        gpu("nan_is"),
    ),
    Mutant(
        "prefixes-without-suffix-sums", SCORES,
        "sum_mn += tl.load(out_mn",
        "sum_mn = tl.load(out_mn",
        OPTIONS,
    ),
    Mutant(
        "two-programs-write-a-row", SCORES,
        "tl.where(pid_n == 0, R, 0)",
        "R",
        MEMORY,
    ),
    # kernels/rankpo_kernels/gpu/rows.py
    Mutant(
        "zero-vectors-have-a-direction", ROWS,
        "inverse = tl.where(length == 0, 0.0,",
        "inverse = tl.where(length == 0, 1.0,",
        FAR_APART,
    ),
    Mutant(
        "squares-overflow", ROWS,
        "    top_x, top_y = tl.where(top_x > TINY, top_x, 1.0), tl.where(top_y > TINY, top_y, "
        "1.0)\n",
        "    top_x, top_y = tl.where(top_x > TINY, 1.0, 1.0), tl.where(top_y > TINY, 1.0, "
        "1.0)\n",
        gpu("overflow"),
    ),
    Mutant(
        "no-tangent", ROWS,
        "g -= along_r[:, None] * unit",
        "g -= 0.0 * unit",
        OPTIONS,
    ),
    # kernels/rankpo_kernels/gpu/products.py
    Mutant(
        "filtered-product-overwrites", PRODUCTS,
        "    if ADD:\n",
        "    if ADD and False:\n",
        FILTER,
    ),
    Mutant(
        "own-negatives-without-tangent", PRODUCTS,
        "- tl.load(gs_LH + level * H + h) * n_unit",
        "- 0.0 * n_unit",
        OPTIONS,
    ),
    Mutant(
        "own-gradients-side-by-side", PRODUCTS,
        "d_own + h * stride_do",
        "d_own + h * D",
        OPTIONS,
    ),
    # kernels/rankpo_kernels/gpu/info_nce.py
    Mutant(
        "top-forgotten", LAUNCHER,
        "(ready, p.dims, top, p.number)",
        "(ready, p.dims, torch.ones_like(top) if relative else None, p.number)",
        FAR_APART,
    ),
    Mutant(
        "chunks-overwrite-dp", LAUNCHER,
        "_product(out, left_RD, dp_ND, not first,",
        "_product(out, left_RD, dp_ND, False,",
        SMALL_CHUNKS,
    ),
    Mutant(
        "pairs-of-the-first-chunk", LAUNCHER,
        "value_LK, part.start, R, K",
        "value_LK, 0, R, K",
        OPTIONS,
    ),
    Mutant(
        "past-the-last-prefix", LAUNCHER,
        "torch.zeros_like if p.dims[-1] < D else torch.empty_like",
        "torch.empty_like",
        OPTIONS,
    ),
    Mutant(
        "chunks-need-all-memory", LAUNCHER,
        "out_RN = new(R0, N,",
        "out_RN = new(M, N,",
        gpu("never_stored"),
    ),
    Mutant(
        "host-waits", LAUNCHER,
        ".amax().clamp(min=1e-38)",
        ".amax().clamp(min=1e-38).item()",
        gpu("does_not_wait"),
    ),
    Mutant(
        "unasked-gradient", LAUNCHER,
        "d_scale=d_scale if need_scale else None",
        "d_scale=d_scale",
        gpu("without_the_others"),
    ),
    Mutant(
        "workspace-exceeded", LAUNCHER,
        "// row_bytes) < 1:",
        "// row_bytes) < 0:",
        gpu("refused"),
    ),
    Mutant(
        "one-launch-more", LAUNCHER,
        "if tiles_n > INLINE_PARTS:",
        "if tiles_n > 1:",
        gpu("launches"),
    ),
    # kernels/rankpo_kernels/objective.py
    Mutant(
        "merge-without-other-mean", OBJECTIVE,
        "+ (b.lse - finite).exp() * b.mean",
        "+ b.mean",
        CPU,
    ),
    Mutant(
        "merge-keeps-the-first-top", OBJECTIVE,
        "torch.maximum(a.top, b.top)",
        "a.top",
        gpu("hardest"),
    ),
    Mutant(
        "smoothing-without-pull", OBJECTIVE,
        "slope_P += omega_P * smooth_P * count_P",
        "pass",
        CPU,
    ),
    Mutant(
        "known-twice", OBJECTIVE,
        "torch.searchsorted(text_of_run, text_N, right=True)",
        "torch.searchsorted(text_of_run, text_N)",
        CPU,
    ),
    # kernels/rankpo_kernels/chunked.py
    Mutant(
        "columns-do-not-fade", CHUNKED,
        "self.e_C.mul_(fade_C)",
        "self.e_C",
        CPU,
    ),
    Mutant(
        "cpu-curated-are-not-exempt", CHUNKED,
        "masked_rC = masked_rC & ~mine_rC",
        "pass",
        CPU,
    ),
    Mutant(
        "cpu-chunks-overwrite-dp", CHUNKED,
        "beta=0 if rows.start == 0 else 1",
        "beta=0",
        CPU_CHUNKS,
    ),
    # kernels/native/rows.cpp
    Mutant(
        "native-keeps-known-pairs", NATIVE,
        "s[in.known_columns[k]] = kMasked",
        "(void)k",
        CPU,
    ),
    # rankpo_fast/ops/info_nce.py
    Mutant(
        "grad-output-forgotten", OPS,
        "times(grad, grad_loss.to(grad.device))",
        "grad",
        OPS_GRADIENTS,
    ),
    Mutant(
        "upstream-rows-forgotten", OPS,
        "ctx.settings, grad_loss_M.contiguous(), needs",
        "ctx.settings, torch.ones_like(grad_loss_M), needs",
        OPS_GRADIENTS,
    ),
    # kernels/rankpo_kernels/gpu/pairs.py
    Mutant(
        "squares-do-not-fade", GPU_PAIRS,
        "square_k = square_k * fade_k * fade_k",
        "square_k = square_k",
        RANKED,
    ),
    Mutant(
        "padding-is-compared", GPU_PAIRS,
        "live_k = live_k & (grade_k == grade_k)",
        "pass",
        RANKED,
    ),
    Mutant(
        "losers-are-not-pushed", GPU_PAIRS,
        "(tl.sum(slope, 1) - tl.sum(slope, 0)) / pairs",
        "tl.sum(slope, 1) / pairs",
        RANKED,
    ),
    Mutant(
        "weights-of-rows-forgotten", GPU_PAIRS,
        "slope_k = slope_k * tl.load(weights_ptr + row)",
        "pass",
        RANKED,
    ),
    Mutant(
        "last-dims-unmasked", GPU_PAIRS,
        "mask_d = offs_d < D\n    q =",
        "mask_d = offs_d < D + 1\n    q =",
        RANKED,
    ),
    # kernels/native/pairs.cpp
    Mutant(
        "native-radial-part-kept", NATIVE_PAIRS,
        "sum[d] = -radial * widen(x[d])",
        "sum[d] = 0",
        PAIRS,
    ),
    Mutant(
        "native-half-infinity-is-a-number", NATIVE_PAIRS,
        "magnitude >= 0x0f800000u",
        "magnitude > 0x7f800000u",
        of("tests/ops/test_rankpo.py", "every_number"),
    ),
    Mutant(
        "native-ties-count", NATIVE_PAIRS,
        "!(grades[a] > grades[b]) : a >= b",
        "!(grades[a] >= grades[b]) : a >= b",
        GROUPS,
    ),
    Mutant(
        "native-blocks-overrun", NATIVE_PAIRS,
        "in.dims - start < kBlock ? in.dims - start : kBlock;\n        const T* x",
        "kBlock;\n        const T* x",
        SANITIZER,
    ),
    # rankpo_fast/ops/rankpo.py
    Mutant(
        "upstream-pairs-forgotten", "rankpo_fast/ops/rankpo.py",
        "ctx.rule, loss_grads_B.contiguous(), needs",
        "ctx.rule, torch.ones_like(loss_grads_B), needs",
        PAIRS,
    ),
    # rankpo_fast/ops/common.py
    Mutant(
        "any-upstream-gradient-is-one", "rankpo_fast/ops/common.py",
        'by.device.type == "cpu" and by == 1',
        'by.device.type == "cpu"',
        PAIRS,
    ),
]  # fmt: skip


def copied(to: Path) -> Path:
    """The tree as it stands, the native library included, without what is not source."""
    skipped = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info",
        "build", "dist", "outputs",
    )  # fmt: skip
    return Path(shutil.copytree(ROOT, to / "tree", ignore=skipped))


def mutated(tree: Path, mutant: Mutant) -> str:
    """The text of its file with the replacement."""
    text = (tree / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.name}: {count} times in {mutant.file}: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def run(tree: Path, *command: str) -> subprocess.CompletedProcess:
    """Python in the copy, which PYTHONPATH puts before the editable install of this tree."""
    paths = os.pathsep.join([str(tree / "kernels"), str(tree)])
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def first_failure(tree: Path, tests: tuple[str, ...]) -> str | None:
    """The test that failed first, None if all passed."""
    options = ["-x", "-rfE", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    try:
        result = run(tree, "-m", "pytest", *options, *tests)
    except subprocess.TimeoutExpired as expired:
        return f"no end within {expired.timeout} s"
    if result.returncode == 0:
        return None
    # a test, and not a file that cannot be imported: that would prove nothing
    if found := re.search(r"^(?:FAILED|ERROR) (.*?::.*?)(?: - |$)", result.stdout, re.MULTILINE):
        return found[1]
    raise RuntimeError(f"pytest {' '.join(tests)}:\n{result.stdout}{result.stderr}")


def caught_by(mutant: Mutant) -> str | None:
    with tempfile.TemporaryDirectory() as directory:
        tree = copied(Path(directory))
        (tree / mutant.file).write_text(mutated(tree, mutant))
        if mutant.file.startswith("kernels/native/"):
            run(tree, "setup.py", "--quiet", "build_ext", "--inplace").check_returncode()
        return first_failure(tree, mutant.tests)


def check_whole(suites: set[tuple[str, ...]]) -> None:
    """A mutant that a red test catches, or one that is not imported, would prove nothing."""
    with tempfile.TemporaryDirectory() as directory:
        tree = copied(Path(directory))
        code = "import rankpo_fast as a, rankpo_kernels as b; print(a.__file__, b.__file__)"
        for file in run(tree, "-c", code).stdout.split():
            if not Path(file).resolve().is_relative_to(tree.resolve()):
                raise SystemExit(f"{file} is imported, and not its copy in {tree}")
        for tests in suites:
            if (failure := first_failure(tree, tests)) is not None:
                raise SystemExit(f"fails without a mutant: {failure}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help="default: all")
    names = parser.parse_args().names
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]

    for mutant in chosen:
        mutated(ROOT, mutant)  # a row that has aged is told of before the long wait
    width = max(len(mutant.name) for mutant in chosen)
    survived = 0
    check_whole({mutant.tests for mutant in chosen})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, caught in zip(chosen, pool.map(caught_by, chosen), strict=True):
            survived += caught is None
            print(f"{mutant.name:{width}}  {caught or 'SURVIVED'}", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
