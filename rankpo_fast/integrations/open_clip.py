"""open_clip's losses by the fused kernels, which never store the matrix of scores.

In a loop of one's own these classes take the places of open_clip's: same arguments, same results.
Within a training task of open_clip 4: `task.loss = fused(task.loss)`. open_clip_train keeps its
lines, given this module's functions; to be started with its flags, by python or torchrun:

    import sys
    from open_clip_train import main
    from rankpo_fast.integrations.open_clip import create_loss, create_task
    main.create_task = create_task  # up to 3.3, and of legacy_main: main.create_loss = create_loss
    main.main(sys.argv[1:])

get_logits, get_ground_truth and _loss are open_clip's own. Where a subclass overrides one of them
the whole loss is, with a warning: it stores the scores. torch.jit.trace, vmap and second
derivatives do not go through the ops. open_clip is imported where one of its own is called. Tried
with open_clip_torch 3.3.0 and 4.2.0.dev0 (June 2026), and torch 2.13.
B pairs of a rank, D dims; images are the queries, texts the passages.
"""

import functools
import inspect
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankpo_fast.integrations.overrides import overridden, warn_unfused
from rankpo_fast.ops.in_batch import siglip_loss
from rankpo_fast.ops.info_nce import info_nce_loss
from rankpo_kernels.problem import Direction

BOTH_WAYS: tuple[Direction, ...] = ("query_to_passage", "passage_to_query")
NOT_FUSED = (
    "those are ClipLoss, SigLipLoss and CoCaLoss; DistillClipLoss compares matrices of scores, "
    "which are never held here. Take open_clip's own"
)
METHODS = ("get_ground_truth", "get_logits", "_loss", "_chunked_loss")  # that a subclass may change


@functools.cache
def loss_file() -> ModuleType:
    """open_clip/loss.py without its package, which imports torchvision and timm."""
    package = find_spec("open_clip")
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError("open_clip is not installed", name="open_clip")
    path = Path(package.submodule_search_locations[0], "loss.py")
    spec = spec_from_file_location("loss_of_open_clip", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _their_class(name: str) -> type[nn.Module]:
    """open_clip's, also where its module was given ours in its place."""
    kind = getattr(sys.modules.get("open_clip.loss"), name, None)
    if kind is None or issubclass(kind, _Loss):
        return getattr(loss_file(), name)
    return kind


def _own_code(name: str) -> Callable:
    """A method of open_clip's class, for subclasses that call or override it."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        of_theirs = self.theirs()
        return getattr(type(of_theirs), name)(of_theirs, *args, **kwargs)

    method.__name__ = name
    return method


class _Loss(nn.Module):
    """What the losses share: open_clip's loss of the same settings, for what is not fused."""

    name: str  # of the class, ours and open_clip's, whose methods are replaced

    def theirs(self) -> nn.Module:
        """open_clip's loss with the settings that this one has now, and the methods that were
        overridden."""
        kind = _their_class(self.name)
        settings = inspect.signature(kind).parameters
        loss = kind(**{name: getattr(self, name) for name in settings})
        for name in self.changes():
            setattr(loss, name, getattr(self, name))
        return loss

    def changes(self) -> list[str]:
        """The methods that are no longer those of the class of this name."""
        raise NotImplementedError


class ClipLoss(_Loss):
    """Each image against all texts and each text against all images (CLIP, Radford et al. 2021).

    Args:
        local_loss: what several ranks return: the mean over their own pairs, or, if False, over
            those of all. With unequal batches the former is weighted, so that the mean over ranks
            is the mean over pairs.
        gather_with_grad: True gives the gradients of one process with all pairs, after the mean
            that DDP takes. False gives what open_clip's does: without local_loss the towers get
            1 / world_size of them (the scale all of its own); with it, a feature gets gradients
            from its own row alone, none for having been a candidate of others or of its partner,
            and scores are computed once for either direction.
        cache_labels: without effect: there are no labels to cache.
        rank, world_size: of torch.distributed, whose default group is used; with a world_size of 1
            nobody is talked to.
        use_horovod: not supported. (open_clip has had no such argument since 3.3.)
    """

    name = "ClipLoss"
    get_logits, get_ground_truth = _own_code("get_logits"), _own_code("get_ground_truth")

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        _refuse_horovod(use_horovod)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def changes(self) -> list[str]:
        return overridden(ClipLoss, self, METHODS)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss in fp32 (fp64 for fp64 features), or {"contrastive_loss": loss}.

        Args:
            image_features, text_features: [B, D], normalised; fp64, fp32, bf16 or fp16. Where
                dtypes differ, the wider one is taken.
            logit_scale: factor of the similarities (not its logarithm); a tensor of one number
                receives a gradient.
            logit_bias: has no part in a softmax; the gradient of a tensor is 0, which keeps DDP
                content.

        Raises:
            ValueError: unequal numbers of images and texts; a rank or world_size unlike that of
                torch.distributed; what `info_nce_loss` refuses.
        """
        if changed := self.changes():
            warn_unfused(self, changed, "open_clip")
            given = image_features, text_features, logit_scale, logit_bias, output_dict
            return self.theirs()(*given)
        _check_pairs(image_features, text_features)
        group = _group(self.rank, self.world_size)
        contrast = functools.partial(
            info_nce_loss, scale=logit_scale, normalize=False, process_group=group
        )
        own_rows_alone = group is not None and not self.gather_with_grad
        if own_rows_alone and self.local_loss:
            loss = contrast(image_features, text_features.detach()) / 2
            loss = loss + contrast(text_features, image_features.detach()) / 2
        else:
            if own_rows_alone:
                image_features = _GradientOver.apply(image_features, self.world_size)
                text_features = _GradientOver.apply(text_features, self.world_size)
            loss = contrast(
                image_features, text_features, directions=BOTH_WAYS, partition="per_direction"
            )
        if group is not None and not self.local_loss:
            loss = _with_value_of_all(loss)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(ClipLoss):
    """`ClipLoss` and the cross entropy of captions (CoCa, Yu et al. 2022), each with its weight.

    Args:
        pad_id: the token that is no target of `caption_loss`, the module that the captions go to.
        local_loss, ..., use_horovod: those of `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]  # open_clip's own subclass has other arguments too
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive loss, caption loss), or a dict of them; logits [B, S, vocabulary] and labels
        [B, S] are those of the captions."""
        contrastive = logits.new_zeros(())
        if self.clip_loss_weight:
            loss = super().forward(image_features, text_features, logit_scale)
            contrastive = self.clip_loss_weight * cast(Tensor, loss)
        caption = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


class SigLipLoss(_Loss):
    """The sigmoid loss of every pair of an image and a text (Zhai et al. 2023, SigLIP), summed over
    texts and averaged over images: a rank's own, against the texts of all.

    Args:
        cache_labels, rank, world_size: as in `ClipLoss`.
        dist_impl: "bidir", "shift", "reduce" or "gather" (None: "bidir"), ways of open_clip's to
            bring texts to images. They give the same numbers, and here are all one gather.
        chunk_size: without effect: the scores are never stored. (New in open_clip 4.)
    """

    name = "SigLipLoss"
    get_logits, get_ground_truth = _own_code("get_logits"), _own_code("get_ground_truth")
    _loss, _chunked_loss = _own_code("_loss"), _own_code("_chunked_loss")

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def changes(self) -> list[str]:
        return overridden(SigLipLoss, self, METHODS)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """As `ClipLoss.forward`, but that logit_bias counts, and receives a gradient as a tensor of
        one number; None is 0."""
        if changed := self.changes():
            warn_unfused(self, changed, "open_clip")
            given = image_features, text_features, logit_scale, logit_bias, output_dict
            return self.theirs()(*given)
        _check_pairs(image_features, text_features)
        loss = siglip_loss(
            image_features,
            text_features,
            scale=logit_scale,
            bias=0.0 if logit_bias is None else logit_bias,
            normalize=False,
            process_group=_group(self.rank, self.world_size),
        )
        return {"contrastive_loss": loss} if output_dict else loss


def fused(loss: nn.Module | None) -> nn.Module:
    """Our loss in the place of open_clip's ClipLoss, SigLipLoss or CoCaLoss, with its settings.

    Raises:
        ValueError: a loss of another class: distillation, which compares matrices of scores; one's
            own, for which ours is to be subclassed.
    """
    if isinstance(loss, _Loss):
        return loss
    for kind in (ClipLoss, SigLipLoss, CoCaLoss):
        if loss is not None and type(loss) is _their_class(kind.__name__):
            names = inspect.signature(kind).parameters
            settings = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
            ours = kind(**settings)
            if isinstance(ours, CoCaLoss):
                ours.caption_loss = cast(nn.CrossEntropyLoss, loss.caption_loss)
            return ours
    raise ValueError(f"{type(loss).__name__} is none of the losses that are fused: {NOT_FUSED}")


def create_loss(args: Namespace) -> nn.Module:
    """The loss that the flags of open_clip_train ask for, of either version.

    Raises:
        ValueError: distillation, GenLIP and GenLAP, whose losses are others; what the losses
            refuse.
    """
    model = args.model.lower()
    if args.distill or "genlip" in model or "genlap" in model:
        raise ValueError(
            f"{'distillation' if args.distill else args.model} has none of the losses that are "
            f"fused: {NOT_FUSED}"
        )
    ranks = {"rank": args.rank, "world_size": args.world_size}
    clip = ranks | {"local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad}
    clip["use_horovod"] = getattr(args, "horovod", False)
    if "coca" in model:
        weights = args.coca_caption_loss_weight, args.coca_contrastive_loss_weight
        return CoCaLoss(*weights, **clip)
    if args.siglip:
        _refuse_horovod(clip["use_horovod"])
        return SigLipLoss(**ranks, dist_impl=args.loss_dist_impl)
    return ClipLoss(**clip)


def create_task(args: Namespace, model: nn.Module, *more: Any, **others: Any) -> nn.Module:
    """open_clip 4's training task for these flags, with the loss fused.

    Raises:
        ValueError: what `fused` and the losses refuse.
    """
    task = import_module("open_clip.factory").create_task(args, model, *more, **others)
    task.loss = fused(getattr(task, "loss", None))
    return task


def _refuse_horovod(asked: bool) -> None:
    if asked:
        raise ValueError(
            "use_horovod: the ranks' losses go through torch.distributed: start with torchrun"
        )


def _check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Or some texts would be taken for further negatives of an image."""
    if image_features.shape[:1] != text_features.shape[:1]:
        raise ValueError(
            "image_features and text_features must be pairs: got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )


def _group(rank: int, world_size: int) -> dist.ProcessGroup | None:
    if world_size == 1:
        return None
    size = dist.get_world_size() if dist.is_initialized() else 0
    if size != world_size:
        raise ValueError(f"world_size is {world_size}, but torch.distributed has {size} ranks")
    if rank != dist.get_rank():
        raise ValueError(f"rank is {rank}, but {dist.get_rank()} in torch.distributed")
    return dist.group.WORLD


class _GradientOver(torch.autograd.Function):
    """x, and 1 / ranks of its gradient. (A hook is lost where torch.compile breaks the graph.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


def _with_value_of_all(loss: Tensor) -> Tensor:
    """The ranks' mean as value; the gradient stays."""
    own = loss.detach()
    mean = own.clone()
    dist.all_reduce(mean)
    return loss + (mean / dist.get_world_size() - own)
