"""What do open_clip's losses cost beside the same losses with our kernels?

Given the normalised features of B images and B texts, loss and gradients of them, of the scale and
of SigLIP's bias, on one device.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.info_nce import DTYPE, FORMS, GATE, PLAIN, gemms
from bench.measure import Case, noting, relative_error
from rankpo_fast.integrations import open_clip as ours

# (B, D); on a card up to where one of them no longer fits.
SHAPES = {"cpu": [(8192, 512)], "cuda": [(8192, 768), (32768, 768), (131072, 768)]}
QUICK = [(512, 64)]
FOR_ERRORS = 512  # pairs: fp64 is slow
THEIRS, OURS = "open_clip", "rankpo-fast"
LOSSES = {  # the scale and bias that each starts from, and the products that it needs
    "ClipLoss": ((1 / 0.07,), FORMS[1]),
    "SigLipLoss": ((10.0, -10.0), PLAIN),
}


@functools.cache
def theirs() -> ModuleType | None:
    """open_clip.loss without its package, which imports torchvision and timm; None where it is not
    installed."""
    package = find_spec("open_clip")
    if package is None:
        return None
    spec = spec_from_file_location(
        "loss_of_open_clip", Path(package.submodule_search_locations[0], "loss.py")
    )
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(name: str, B: int, D: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Features, with pairs about as similar as the hardest others, and numbers."""
    images, texts = torch.randn(2, B, D, device=device)
    features = [F.normalize(x).to(dtype) for x in (images, texts + 0.1 * images)]
    wide = torch.promote_types(dtype, torch.float32)
    numbers = [torch.tensor(x, device=device, dtype=wide) for x in LOSSES[name][0]]
    return [x.requires_grad_() for x in features + numbers]


def run_of(module: ModuleType, name: str, leaves: list[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """(loss, gradients)."""
    loss = getattr(module, name)()

    def run():
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def cases(device: str, quick: bool) -> Iterator[Case]:
    if theirs() is None:
        print("open_clip is not installed: its losses are left out\n")
        return
    modules = {OURS: ours, THEIRS: theirs()}
    for name, (_, form) in LOSSES.items():
        for B, D in QUICK if quick else SHAPES[device]:
            leaves = draw(name, FOR_ERRORS, D, device, DTYPE[device])
            exact = run_of(theirs(), name, [x.detach().double().requires_grad_() for x in leaves])()
            errors = dict.fromkeys(modules, math.nan)
            for who, module in modules.items():
                with noting(who, {}):
                    errors[who] = relative_error(run_of(module, name, leaves)(), exact)
            leaves = draw(name, B, D, device, DTYPE[device])
            runs = {who: run_of(module, name, leaves) for who, module in modules.items()}
            yield Case(
                name=f"{THEIRS} {name} {B}x{D}",
                question=__doc__.splitlines()[0],
                shape={"B": B, "D": D},
                device=device,
                contenders={form.floor: gemms(form, *leaves[:2])} | runs,
                floor=form.floor,
                keep_bytes=sum(x.nbytes for x in leaves),
                errors=errors,
                gate=GATE[device],
                peers=frozenset([THEIRS]),
            )
