"""Do packed texts get the states they get alone, and does none see another? Asked at every load.

A token that sees another text makes no crash and no odd loss, only a model that is a little wrong.
S texts of T tokens in all, D dims.
"""

import torch
from torch import Tensor

from rankpo_fast.data.moving import to_device
from rankpo_fast.data.packing import MicroBatch, pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError
from rankpo_fast.model.attention import SHORT, Kernel
from rankpo_fast.model.directories import MODEL_FLAG
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.tokenizer import embedding_rows

# Largest relative error of a text's states that is put down to rounding. Two ways to sum in fp32
# differ by 1e-7 to 1e-6. A bf16 state is off by 2^-9 wherever it is stored, some ten times a layer:
# 2^-9 sqrt(10 * 60) for a deep model. Texts that see each other are off by 0.1 and more. In bf16 a
# window off by one may hide below that: kernels are checked for those in tests/train/test_cuda.py.
ROUNDING = {False: 1e-5, True: 5e-2}
WINDOW_LIMIT = 256  # sliding windows up to here are crossed: a longer text would take too long


@torch.no_grad()
def check_packing(encoder: Encoder, kernel: Kernel) -> None:
    """Compare a few short texts of random ids, packed, with the backbone's own attention.

    The encoder is left with `kernel`, packing. No random number is drawn from torch's generators.

    Raises:
        InputError: packed texts get other states, or see each other; or no text gets numbers that
            are finite, packed or not.
        Unpackable: the backbone asks for something that packed texts cannot have.
    """
    training, bf16 = encoder.training, encoder.bf16
    # Where the kernel and the weights take fp32 that will do: it shows smaller errors.
    half = bf16 and (kernel.capability is not None or encoder.backbone.dtype == torch.bfloat16)
    encoder.eval()
    encoder.bf16 = half
    batch, other = (to_device(sample, encoder.device) for sample in _samples(encoder))
    try:
        encoder.use_kernel(None)
        alone = encoder.states(batch)
        _check_finite(encoder, alone)
        encoder.use_kernel(kernel)
        packed, beside_other = encoder.states(batch), encoder.states(other)
    finally:
        encoder.bf16 = bf16
        encoder.train(training)
    rounding = ROUNDING[half]
    unlike = _errors(packed, alone, batch)
    leaks = _errors(beside_other, packed, batch)
    leaks[1] = 0.0  # the text whose ids are others
    for error, bound, fault in [
        (unlike, rounding, "packed texts do not get the states that they get alone"),
        (leaks, rounding / 10, "packed texts see each other"),
    ]:
        if not error.max() <= bound:  # nan is none
            raise InputError(
                f"--packing true: {fault} in {type(encoder.backbone).__name__} with {kernel.name} "
                f"attention (relative error {error.max():.1e}, rounding makes less than "
                f"{bound:.0e}); --packing false avoids it"
            )


def broken_weights(encoder: Encoder) -> list[str]:
    """The names of the backbone's tensors that hold NaN or inf."""
    tensors = encoder.backbone.state_dict().items()
    return [name for name, tensor in tensors if not tensor.isfinite().all()]


def _check_finite(encoder: Encoder, states: Tensor) -> None:
    """InputError unless the states are finite; it names the weights that are not."""
    if states.isfinite().all():
        return
    cause = "every weight is finite, so numbers overflow on their way"
    if bad := broken_weights(encoder):
        total = len(encoder.backbone.state_dict())
        cause = f"{len(bad)} of {total} tensors hold NaN or infinity: {', '.join(bad[:3])}"
    raise InputError(f"{MODEL_FLAG} {encoder.backbone.name_or_path}: what the model computes is "
                     f"not finite: {cause}")  # fmt: skip


def _samples(encoder: Encoder) -> tuple[MicroBatch, MicroBatch]:
    """Four texts of random ids, and the same with another second text."""
    config = encoder.backbone.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    limit = max(encoder.settings.max_query_length, encoder.settings.max_passage_length)
    # The first is of a length that sdpa serves, the others not: see attention.SHORT.
    wanted = [SHORT + 16 + (window if window <= WINDOW_LIMIT else 0), 9, 9, 4]
    lengths = torch.tensor([min(length, limit) for length in wanted])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    generator = torch.Generator().manual_seed(0)
    rows = embedding_rows(encoder.backbone)
    ids = torch.randint(rows - 1, (2, int(offsets[-1])), generator=generator, dtype=torch.int32)
    ids += ids >= encoder.tokenizer.pad_token_id  # which some backbones take for padding anywhere
    ids[1, : offsets[1]] = ids[0, : offsets[1]]
    ids[1, offsets[2] :] = ids[0, offsets[2] :]
    first, second = (
        pack(TokenTable(row, offsets, truncated=0), torch.arange(len(lengths))) for row in ids
    )
    return first, second


def _errors(states: Tensor, expected: Tensor, batch: MicroBatch) -> Tensor:
    """Relative error of each text's states, [S], on the CPU."""
    parts = (x.double().cpu().split(batch.lengths) for x in (states - expected, expected))
    return torch.stack([(a.norm() / b.norm()) for a, b in zip(*parts, strict=True)])
