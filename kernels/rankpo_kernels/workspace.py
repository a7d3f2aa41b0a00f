"""Memory that losses take for scores, where nobody says how much."""

import torch

DEFAULT_WORKSPACE = {"cpu": 90 << 20, "cuda": 256 << 20}
KEPT_ON_CPU = 256 << 20  # of both directions there: exponentials that are kept spare a product
LARGE_GPU, LARGE_WORKSPACE = 79 * 10**9, 1 << 30  # what GPUs of 80 GB say they have, and take


def default_workspace(device_type: str, memory_bytes: int = 0) -> int:
    """Of a device with so much memory: large chunks are few, and their products fill the GPU."""
    if device_type == "cuda" and memory_bytes >= LARGE_GPU:
        return LARGE_WORKSPACE
    return DEFAULT_WORKSPACE[device_type]


def workspace_of(device: torch.device) -> int:
    """The default of a device that is here."""
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    return default_workspace(device.type, memory)


def most_workspace(device: torch.device) -> int:
    """That any loss takes by default."""
    return max(workspace_of(device), KEPT_ON_CPU if device.type == "cpu" else 0)
