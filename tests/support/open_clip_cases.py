"""open_clip's losses in plain torch, towers to train with them, and what ranks do.

Images and texts are rows of numbers, features are of 8 dims.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from rankpo_fast.integrations import open_clip as ours
from rankpo_fast.integrations.open_clip import loss_file as theirs
from support.gates import pass_the_gates

SIZES = {"even": [4, 4, 4], "uneven": [5, 3, 0]}  # pairs of each rank, from the front


def clip(image_features, text_features, logit_scale, logit_bias=None, own_rows_alone=False):
    """Cross entropy of each row of both matrices of scores; `own_rows_alone`: candidates get no
    gradient."""
    loss = 0.0
    for x, y in ((image_features, text_features), (text_features, image_features)):
        scores = logit_scale * x @ (y.detach() if own_rows_alone else y).T
        loss = loss + F.cross_entropy(scores, torch.arange(len(x))) / 2
    return loss


def siglip(image_features, text_features, logit_scale, logit_bias):
    """-log sigmoid of each score, or of minus the score where image and text are no pair."""
    scores = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(scores), dtype=scores.dtype) - 1
    return -F.logsigmoid(signs * scores).sum(1).mean()


DEFINITIONS = {"ClipLoss": clip, "SigLipLoss": siglip}


class Towers(nn.Module):
    """What open_clip's models return, bias included."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.images, self.texts = nn.Linear(6, 8), nn.Linear(5, 8)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, images, texts):
        return {
            "image_features": F.normalize(self.images(images), dim=-1),
            "text_features": F.normalize(self.texts(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def inputs(pairs, dtype=torch.float32, seed=0):
    """Rows of images [pairs, 6] and of their texts [pairs, 5]."""
    images = torch.randn(
        pairs, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return images.to(dtype), images[:, 1:].sin().to(dtype)


def descend(loss, model, *batch):
    """(loss, gradients by name of the parameter) of a batch."""
    value = loss(**model(*batch))
    value.backward()
    return value.detach(), {name: x.grad for name, x in model.named_parameters()}


def exact(loss):
    """Features as they come in fp32, the loss of them in fp64."""
    return lambda **features: loss(**{name: x.double() for name, x in features.items()})


def compare(name, whose, sizes, **options):
    """(loss, *gradients as DDP leaves them), twice: ours, and theirs in fp64 in the same group or
    those of the definition in one process with all pairs."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dtype = torch.float32 if whose == "open_clip" else torch.float64
    counts = SIZES[sizes][:size]
    batch = inputs(sum(counts), dtype)
    own = [x.split(counts)[rank] for x in batch]
    options |= {"rank": rank, "world_size": size}

    def of_ranks(module):
        model = nn.parallel.DistributedDataParallel(Towers().to(dtype))
        loss = getattr(module, name)(**options)
        return descend(loss if module is ours else exact(loss), model.train(), *own)

    loss, grads = of_ranks(ours)
    grads = {name.removeprefix("module."): x for name, x in grads.items()}
    if whose == "open_clip":
        value, want = of_ranks(theirs())
        want = {name.removeprefix("module."): x for name, x in want.items()}
    else:
        definition, towers = DEFINITIONS[name], 1.0
        if name == "ClipLoss" and not options["gather_with_grad"]:
            if options["local_loss"]:
                definition = functools.partial(definition, own_rows_alone=True)
            else:
                towers = 1 / size
        value, want = descend(definition, Towers().to(dtype), *batch)
        want = {k: x if x is None or not x.dim() else x * towers for k, x in want.items()}
        if name == "SigLipLoss" or options["local_loss"]:
            loss = loss / size
            dist.all_reduce(loss)
    if name == "ClipLoss":
        assert grads.pop("logit_bias") == 0
        del want["logit_bias"]  # theirs has what rounding leaves
    assert grads.keys() == want.keys()
    return [loss, *grads.values()], [value, *want.values()]


def compare_dist_impls():
    """Of their four ways of bringing texts to images, errors beside the first in fp64."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = [x.chunk(size)[rank] for x in inputs(4 * size)]
    results = []
    for way in ("bidir", "shift", "reduce", "gather"):
        loss = theirs().SigLipLoss(rank=rank, world_size=size, dist_impl=way)
        for of in (exact(loss), loss):
            value, grads = descend(of, nn.parallel.DistributedDataParallel(Towers()), *own)
            results.append([value, *grads.values()])
    return [pass_the_gates(each, results[0], logits=10) for each in results[1::2]]


def compare_compiled():
    """A compiled loss and its gradients, in the form with most around the ops, beside fp64."""
    options = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    results = []
    for wrap in (torch.compile(backend="aot_eager"), exact):
        value, grads = descend(wrap(ours.ClipLoss(**options)), Towers(), *inputs(4))
        del grads["logit_bias"]  # which falls out
        results.append([value, *grads.values()])
    return pass_the_gates(*results, logits=10)


def refuse():
    """A size that is not the group's."""
    ours.ClipLoss(world_size=7)(*torch.ones(2, 3, 4), 10.0)
