"""What `make wheel` asks of a wheel: run by the Python of an environment that has nothing else.

    python -I .ci/wheel.py build/wheels/rankpo_fast-*.whl [build/wheels/rankpo_bench-*.whl]

It holds what belongs in and nothing besides; it brought torch, triton, numpy and what these need;
its losses have gradients, from a directory that is not the checkout: by the native library, unless
the wheel is one for any platform.
"""

import os
import re
import sys
import tempfile
import warnings
import zipfile
from importlib import metadata, util
from pathlib import Path

BASE = {"torch", "triton", "numpy"}
INSTALLERS = {"pip", "setuptools", "wheel"}
BENCH_LEAVES_OUT = ("conftest.py", "test_cases.py", "setup.py", ".json", ".png", ".sh")


def is_for_any_platform(wheel: Path) -> bool:
    return wheel.name.endswith("-any.whl")


def check_names(wheel: Path, packages: set[str]) -> list[str]:
    """The names in a wheel, all of them of these packages or its metadata."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    strangers = {top for top in tops - packages if not top.endswith(".dist-info")}
    assert packages <= tops and not strangers, f"{wheel.name} holds {sorted(tops)}"
    return names


def check_wheel(wheel: Path) -> None:
    names = check_names(wheel, {"rankpo_fast", "rankpo_kernels"})
    native = [name for name in names if "librankpo_native" in name]
    assert "-py3-none-" in wheel.name, wheel.name
    assert len(native) == (not is_for_any_platform(wheel)), f"{wheel.name} has {native}"
    assert not any(name.endswith((".png", ".cpp")) for name in names), wheel.name
    for package in ("rankpo_fast", "rankpo_kernels"):
        assert f"{package}/py.typed" in names, f"{wheel.name} has no py.typed of {package}"
    assert "rankpo_fast/judge/page.html" in names, f"{wheel.name} has no page for annotators"


def check_bench(wheel: Path) -> None:
    names = check_names(wheel, {"rankpo_bench"})
    wrong = [name for name in names if name.endswith(BENCH_LEAVES_OUT)]
    assert not wrong and is_for_any_platform(wheel), f"{wheel.name}: {wrong}"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_installed() -> None:
    """Nothing is installed but rankpo-fast, its base, what that needs, and installers."""
    installed = {plain(found.metadata["Name"]): found for found in metadata.distributions()}
    needed, waiting = {"rankpo-fast"}, sorted(BASE & set(installed))
    while waiting:
        name = waiting.pop()
        if name in needed or name not in installed:
            continue
        needed.add(name)
        for requirement in installed[name].requires or []:
            words, _, marker = requirement.partition(";")
            if "extra ==" not in marker:
                waiting.append(plain(re.match(r"[\w.-]+", words)[0]))
    surplus = sorted(set(installed) - needed - INSTALLERS)
    assert not surplus, f"rankpo-fast brought {surplus}"
    for name in ("bench", "rankpo_bench", "tests", "kernels", "transformers"):
        assert util.find_spec(name) is None, f"{name} can be imported"


def check_losses(native_wanted: bool) -> str:
    """A forward and a backward of two losses; what did their rows."""
    import torch

    from rankpo_fast import info_nce_loss, rankpo_loss
    from rankpo_kernels.chunked import native

    torch.manual_seed(0)
    q, p, r = (torch.randn(32, 64, requires_grad=True) for _ in range(3))
    with warnings.catch_warnings():
        # The library says by a warning that it is missing.
        warnings.filterwarnings("error" if native_wanted else "ignore", "rankpo-fast's native")
        loss = info_nce_loss(q, p) + rankpo_loss(q, p, r)
        loss.backward()
        library = native.library()
    assert torch.isfinite(loss) and (library is not None) == native_wanted
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, p, r))
    return library.rankpo_instruction_set().decode() if library else "torch alone"


def main(wheels: list[Path]) -> None:
    ours, bench = wheels[0], wheels[1:]
    check_wheel(ours)
    for wheel in bench:
        check_bench(wheel)
    check_installed()
    with tempfile.TemporaryDirectory() as elsewhere:
        os.chdir(elsewhere)
        rows = check_losses(native_wanted=not is_for_any_platform(ours))
        os.chdir(ours.parent)
    names = " and ".join(wheel.name for wheel in wheels)
    print(f"{names}: as they should be; the losses run, their rows by {rows}")


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]])
