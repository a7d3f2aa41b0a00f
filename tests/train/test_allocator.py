"""What a step frees the next one gets, without asking the system."""

import platform
import resource

import pytest
import torch

from rankpo_fast.train.allocator import freed_memory_kept

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")


def faults():
    """Pages that the system handed out for ten tensors of 8 MiB, one after the other."""
    torch.ones(1 << 21)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_freed_memory_is_used_again_while_training_and_given_back_after_it():
    pages = 10 * (8 << 20) // resource.getpagesize()
    with freed_memory_kept(torch.device("cpu")):
        assert faults() < pages / 5
    assert faults() > pages / 2


@glibc
def test_on_a_card_nothing_changes():
    with freed_memory_kept(torch.device("cuda", 0)):
        assert faults() > 5 * (8 << 20) // resource.getpagesize()
