"""Packages that are not installed here, played by modules of their names."""

import sys
import types
from importlib import metadata


def liger(monkeypatch, *families: str) -> list[dict]:
    """liger-kernel 0.8.5 with kernels for these model types; the calls that it gets."""
    calls = []
    package = types.ModuleType("liger_kernel")
    transformers = types.ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = lambda **given: calls.append(given)
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = dict.fromkeys(families)
    for module in (package, transformers, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    say_version(monkeypatch, "liger-kernel", "0.8.5")
    return calls


def say_version(monkeypatch, package: str, version: str) -> None:
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: version if name == package else real(name)
    )
