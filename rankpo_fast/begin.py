"""Imports torch, the first time and for all, while Ctrl-C waits."""

from rankpo_fast.signals import held_back

with held_back():
    import torch  # noqa: F401
