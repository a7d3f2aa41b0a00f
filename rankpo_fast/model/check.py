"""Do packed texts get the states they get alone, and does none see another? Asked at every load.
And where products are kept: does a layer that is computed again from them come out the same?

A token that sees another text makes no crash and no odd loss, only a model that is a little wrong.
S texts of T tokens in all, D dims.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankpo_fast.data.moving import to_device
from rankpo_fast.data.packing import MicroBatch, pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError
from rankpo_fast.model.attention import SHORT, Kernel
from rankpo_fast.model.directories import MODEL_FLAG
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.layers import Checkpointing
from rankpo_fast.model.tokenizer import embedding_rows

# Largest relative error of a text's states that is put down to rounding. Two ways to sum in fp32
# differ by 1e-7 to 1e-6. A bf16 state is off by 2^-9 wherever it is stored, some ten times a layer:
# 2^-9 sqrt(10 * 60) for a deep model. Texts that see each other are off by 0.1 and more. In bf16 a
# window off by one may hide below that: kernels are checked for those in tests/train/test_cuda.py.
ROUNDING = {False: 1e-5, True: 5e-2}
SMALL = 1 << 16  # numbers
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


def selective_is_exact(encoder: Encoder) -> bool:
    """Whether selective checkpointing gives the gradients that full checkpointing gives.

    It does not where a layer writes over a product (`states += residual`): what is kept, and handed
    on when the layer is computed again, is then no longer the product. torch does not always see
    it. Compared are small parameters, as those of norms, which every layer has or LoRA gives it; a
    layer that goes wrong spoils those of the layers before it.
    """
    if not any(parameter.requires_grad for parameter in encoder.backbone.parameters()):
        return True
    kind, training = encoder.layers.checkpointed, encoder.training
    batch = to_device(_samples(encoder)[0], encoder.device)
    encoder.train()
    try:
        selective, full = (_small_gradients(encoder, batch, way) for way in ("selective", True))
    except RuntimeError as error:
        if "mutated" not in str(error):
            raise
        return False
    finally:
        encoder.layers.checkpoint(kind)
        encoder.train(training)
    differences = torch.stack([(a - b).norm() for a, b in zip(selective, full, strict=True)])
    norms = torch.stack([gradient.norm() for gradient in full])
    return bool(differences.norm() <= ROUNDING[encoder.bf16] * norms.norm())


def _small_gradients(encoder: Encoder, batch: MicroBatch, way: Checkpointing) -> list[Tensor]:
    encoder.layers.checkpoint(way)
    gpus = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):  # dropout draws the same each time
        torch.manual_seed(0)
        vectors = encoder(batch)
    loss, parts = vectors.square().sum(), lies_in_parts(encoder.backbone)
    if parts:  # whose gradients nothing but a backward pass of all ranks brings together
        loss.backward()
    trained = [p for p in encoder.backbone.parameters() if p.requires_grad]
    small = [p for p in trained if p.numel() <= SMALL] or trained
    if parts:
        gradients = [whole(p.grad) for p in small if p.grad is not None]
        encoder.zero_grad(set_to_none=True)
    else:
        found = torch.autograd.grad(loss, small, allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
    return [gradient.double() for gradient in gradients]


def broken_weights(encoder: Encoder) -> list[str]:
    """The names of the backbone's tensors that hold NaN or inf; all ranks must ask of weights that
    lie in parts."""
    tensors = encoder.backbone.state_dict().items()
    return [name for name, tensor in tensors if not whole(tensor).isfinite().all()]


def lies_in_parts(module: nn.Module) -> bool:
    """Whether its weights lie in parts on several ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in parts; then all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
