"""Liger's kernels for the backbones of a sentence-transformers model."""

from typing import TYPE_CHECKING

from rankpo_fast.model.liger import apply_liger

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def use_liger_kernel(model: "SentenceTransformer") -> None:
    """Liger's kernels in the transformers backbones of a model on a GPU, where the argument
    `use_liger_kernel=True` of the trainer changes nothing.

    Raises:
        ValueError: a backbone that Liger has no kernels for, a model on the CPU, no backbone at
            all, or liger-kernel missing or too old.
    """
    from transformers import PreTrainedModel

    backbones = [
        child
        for module in model.modules() if not isinstance(module, PreTrainedModel)
        for child in module.children() if isinstance(child, PreTrainedModel)
    ]  # fmt: skip
    if not backbones:
        raise ValueError("use_liger_kernel: the model has no transformers backbone")
    for backbone in backbones:
        apply_liger(backbone, model.device)
