"""open_clip's losses by the fused kernels, which never store the matrix of scores.

In a loop of one's own these classes take the places of open_clip's: same arguments, same results.
open_clip_train keeps its line `loss = create_loss(args)`, given this module's `create_loss`; to be
started with its flags, by python or torchrun:

    import sys
    from open_clip_train import main
    from rankpo_fast.integrations.open_clip import create_loss
    main.create_loss = create_loss
    main.main(sys.argv[1:])

torch.jit.trace, vmap and second derivatives do not go through the ops. Nothing of open_clip is
imported here. Tried with open_clip_torch 3.3.0 and torch 2.13.
B pairs of a rank, D dims; images are the queries, texts the passages.
"""

from argparse import Namespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rankpo_fast.ops.in_batch import siglip_loss
from rankpo_fast.ops.info_nce import info_nce_loss

BOTH_WAYS = ("query_to_passage", "passage_to_query")


class ClipLoss(nn.Module):
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
        cache_labels, rank: without effect: there are no labels to cache, and the group knows.
        world_size: of torch.distributed, whose default group is used; with 1 nobody is talked to.
        use_horovod: not supported.
    """

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
        self.world_size = world_size

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
            ValueError: unequal numbers of images and texts; a world_size unlike that of
                torch.distributed; what `info_nce_loss` refuses.
        """
        _check_pairs(image_features, text_features)
        group = _group(self.world_size)
        options = {"scale": logit_scale, "normalize": False, "process_group": group}
        features = image_features, text_features
        own_rows_alone = group is not None and not self.gather_with_grad
        if own_rows_alone and self.local_loss:
            loss = info_nce_loss(image_features, text_features.detach(), **options) / 2
            loss = loss + info_nce_loss(text_features, image_features.detach(), **options) / 2
        else:
            if own_rows_alone:
                features = [_GradientOver.apply(x, self.world_size) for x in features]
            loss = info_nce_loss(
                *features, directions=BOTH_WAYS, partition="per_direction", **options
            )
        if group is not None and not self.local_loss:
            loss = _with_value_of_all(loss)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(ClipLoss):
    """`ClipLoss` and the cross entropy of captions (CoCa, Yu et al. 2022), each with its weight.

    Args:
        pad_id: the token that is no target.
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
        self.pad_id = pad_id

    def forward(
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
            contrastive = super().forward(image_features, text_features, logit_scale)
            contrastive = self.clip_loss_weight * contrastive
        targets = logits.flatten(0, 1), labels.flatten()
        caption = self.caption_loss_weight * F.cross_entropy(*targets, ignore_index=self.pad_id)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


class SigLipLoss(nn.Module):
    """The sigmoid loss of every pair of an image and a text (Zhai et al. 2023, SigLIP), summed over
    texts and averaged over images: a rank's own, against the texts of all.

    Args:
        cache_labels, rank, world_size: as in `ClipLoss`.
        dist_impl: "bidir", "shift", "reduce" or "gather" (None: "bidir"), ways of open_clip's to
            bring texts to images. They give the same numbers, and here are all one gather.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ):
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        self.world_size = world_size

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
        _check_pairs(image_features, text_features)
        loss = siglip_loss(
            image_features,
            text_features,
            scale=logit_scale,
            bias=0.0 if logit_bias is None else logit_bias,
            normalize=False,
            process_group=_group(self.world_size),
        )
        return {"contrastive_loss": loss} if output_dict else loss


def create_loss(args: Namespace) -> nn.Module:
    """The loss that the flags of open_clip_train ask for.

    Raises:
        ValueError: distillation, which compares matrices of scores; what the losses refuse.
    """
    if args.distill:
        raise ValueError(
            "distillation compares matrices of scores, which these losses never hold: use "
            "open_clip.loss.DistillClipLoss"
        )
    _refuse_horovod(args.horovod)
    ranks = {"rank": args.rank, "world_size": args.world_size}
    clip = ranks | {"local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad}
    if "coca" in args.model.lower():
        weights = args.coca_caption_loss_weight, args.coca_contrastive_loss_weight
        return CoCaLoss(*weights, **clip)
    return SigLipLoss(**ranks, dist_impl=args.loss_dist_impl) if args.siglip else ClipLoss(**clip)


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


def _group(world_size: int) -> dist.ProcessGroup | None:
    if world_size == 1:
        return None
    size = dist.get_world_size() if dist.is_initialized() else 0
    if size != world_size:
        raise ValueError(f"world_size is {world_size}, but torch.distributed has {size} ranks")
    return dist.group.WORLD


class _GradientOver(torch.autograd.Function):
    """x, and 1 / ranks of its gradient. (A hook is lost where torch.compile breaks the graph.)"""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


def _with_value_of_all(loss: Tensor) -> Tensor:
    """The ranks' mean as value; the gradient stays."""
    own = loss.detach()
    mean = own.clone()
    dist.all_reduce(mean)
    return loss + (mean / dist.get_world_size() - own)
