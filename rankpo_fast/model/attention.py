"""Attention among the tokens of one text where texts lie end to end, for any backbone.

    out[t] = sum_u softmax_u(scaling * <query[t], key[u]>) value[u]    over the u that t sees

T tokens of S texts, L of one of them; H heads, K heads of keys and values, E dims of a head.

Transformers calls what is registered under the name in `config._attn_implementation`, and makes no
mask for a name that it has none for. `packed_arguments` of a micro-batch, given to the backbone's
forward, arrive here through every layer, gradient checkpointing included.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankpo_fast.data.packing import MicroBatch
from rankpo_fast.model.dropout import DroppedAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Up to here two products and a softmax beat sdpa on the CPU: 9 to 15 ms instead of 16 to 37 for
# 4,096 tokens forward and backward in texts of 5 to 30 tokens, 8 heads of 32 dims.
SHORT = 32


class Unpackable(Exception):
    """Something in the backbone cannot be had for packed texts; the message says what."""


@dataclass(eq=False)  # not frozen: torch.compile would look into that, and compile for every S
class Texts:
    """Where texts lie."""

    offsets: Tensor  # [S + 1] int32
    lengths: tuple[int, ...]  # S
    longest: int  # no text is longer


@dataclass(frozen=True)
class Asked:
    """What a call asks for, besides softmax(query key') value within each text."""

    texts: Texts
    causal: bool
    window: int | None  # tokens as far apart as this, or farther, do not see each other
    scaling: float
    softcap: float | None  # scores become softcap * tanh(scores / softcap)
    dropout: float  # of the weights


Attend = Callable[[Tensor, Tensor, Tensor, Asked], Tensor]  # [T, H, E], [T, K, E] * 2 -> [T, H, E]


@dataclass(frozen=True)
class Needs:
    """What decides which kernels can serve a backbone."""

    device: torch.device
    half: bool  # computes in bf16 or fp16
    head_dim: int
    window: bool
    softcap: bool
    dropout: bool


@dataclass(frozen=True)
class Kernel:
    """An attention kernel for packed texts, and what it can do."""

    name: str  # as --attn_implementation has it
    alias: str  # as transformers has it: words like "flash" and "sdpa" mean something there
    make: Callable[[], Attend]
    distribution: str = "torch"  # flash-attn 2 and 4 share a module name, not this one
    capability: tuple[int, int] | None = None  # of the GPU; None: any device, any dtype
    head_dim: int = 256
    window: bool = True
    softcap: bool = True
    dropout: bool = True

    def why_not(self, needs: Needs) -> str | None:
        """Why it cannot serve those needs here; None if it can."""
        if not _installed(self.distribution):
            return f"{self.distribution} is not installed"
        if self.capability is None:
            return None
        if needs.device.type != "cuda" or not needs.half:
            return "it needs a GPU and --bf16 true"
        own = torch.cuda.get_device_capability(needs.device)
        if own < self.capability:
            return f"it needs compute capability {self.capability}, this GPU has {own}"
        if needs.head_dim > self.head_dim or needs.head_dim % 8:
            return f"heads of {needs.head_dim} dims are not for it"
        for need in ("window", "softcap", "dropout"):
            if getattr(needs, need) and not getattr(self, need):
                return f"it has no {need}"
        if needs.softcap and needs.dropout:
            return "it has softcap or dropout, not both"
        return None


def packed_arguments(batch: MicroBatch) -> dict[str, Any]:
    """What the backbone's forward is given so that `packed_attention` knows where texts end."""
    # Rounded up, so that few values come: kernels and torch.compile are then not built for each.
    longest = 1 << (max(batch.lengths) - 1).bit_length()
    return {"packed_texts": Texts(batch.offsets, batch.lengths, longest)}


def packed_attention(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_texts: Texts | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, H, T, E], key and value [1, K, T, E] -> [1, T, H, E].

    A token sees `sliding_window` tokens, itself and those before it; without causality as many
    after it too. This is how transformers reads it wherever a layer hands it over.

    Raises:
        Unpackable: a mask, a bias or a sink, which would otherwise be ignored.
    """
    if packed_texts is None:
        raise Unpackable("its layers do not hand on where texts end")
    if attention_mask is not None:
        raise Unpackable("it makes an attention mask of its own")
    for name in ("position_bias", "s_aux", "sinks", "indices", "block_indices"):
        if others.get(name) is not None:
            raise Unpackable(f"its attention has {name}")
    if query.shape[-1] != value.shape[-1]:
        raise Unpackable("its values have other dims than its keys")
    asked = Asked(
        texts=packed_texts,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        window=sliding_window,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        dropout=dropout,
    )
    dtype = value.dtype  # rotary positions may have left queries and keys in fp32
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    return attend(q, k, v, asked)[None], None


# --- kernels on GPUs ---


def _flash(module: str) -> Attend:
    """flash-attn's function for packed texts: versions 2, 3 and 4 agree in the names used here."""
    function = importlib.import_module(module).flash_attn_varlen_func
    takes = inspect.signature(function).parameters.keys()

    def attend(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
        texts = asked.texts
        options: dict[str, Any] = {}  # only what does something: not every version has each
        if asked.window is not None and asked.window < texts.longest:
            options["window_size"] = _sides(asked.window, asked.causal)
        if asked.softcap is not None:
            options["softcap"] = asked.softcap
        if asked.dropout > 0:
            options["dropout_p"] = asked.dropout
        if torch.are_deterministic_algorithms_enabled():
            if "deterministic" not in takes:
                raise Unpackable(f"this version of {module} cannot sum in one order")
            options["deterministic"] = True
        output = function(
            query,
            key,
            value,
            cu_seqlens_q=texts.offsets,
            cu_seqlens_k=texts.offsets,
            max_seqlen_q=texts.longest,
            max_seqlen_k=texts.longest,
            softmax_scale=asked.scaling,
            causal=asked.causal,
            **options,
        )
        return output[0] if isinstance(output, tuple) else output  # some give log-sum-exps too

    return attend


def _varlen() -> Attend:
    """torch's own kernel, flash-attn 2 within; its arguments differ from release to release."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters.keys()

    def attend(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
        assert asked.softcap is None and asked.dropout == 0, "another kernel was to be chosen"
        texts = asked.texts
        options: dict[str, Any] = {}
        if "scale" in takes:
            options["scale"] = asked.scaling
        else:
            query = query * (asked.scaling * math.sqrt(query.shape[-1]))
        if "enable_gqa" in takes:
            options["enable_gqa"] = query.shape[1] != key.shape[1]
        else:
            key, value = (_for_each_head(states, query) for states in (key, value))
        window = asked.window
        if window is not None and window >= texts.longest:
            window = None
        if "window_size" in takes:
            full = (-1, 0) if asked.causal else (-1, -1)
            options["window_size"] = full if window is None else _sides(window, asked.causal)
        elif window is not None:
            raise Unpackable("this version of torch has no sliding window in varlen_attn")
        else:
            options["is_causal"] = asked.causal
        ends = (texts.offsets, texts.offsets, texts.longest, texts.longest)
        output = varlen_attn(query, key, value, *ends, **options)
        assert isinstance(output, Tensor), "nothing beside it was asked for"
        return output

    return attend


def _sides(window: int, causal: bool) -> tuple[int, int]:
    """How many tokens before itself and after itself a token sees."""
    return window - 1, 0 if causal else window - 1


def _for_each_head(states: Tensor, query: Tensor) -> Tensor:
    """Keys or values [T, K, E], each repeated for the queries that share it: [T, H, E]."""
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


# --- anywhere, in any dtype ---


@torch.compiler.disable
def _by_text(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
    """Texts of equal length that lie side by side are one batch, so nothing is padded or copied."""
    runs = [(len(list(run)), length) for length, run in groupby(asked.texts.lengths)]
    sizes = [count * length for count, length in runs]
    parts = zip(runs, *(states.split(sizes) for states in (query, key, value)), strict=True)
    outputs = []
    for run, *part in parts:
        q, k, v = (states.unflatten(0, run).transpose(1, 2) for states in part)  # [n, H, L, E]
        outputs.append(_attend(q, k, v, asked))
    return torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])


def _attend(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
    """Texts of one length: query [n, H, L, E], key and value [n, K, L, E] -> [n, H, L, E]."""
    length = query.shape[2]
    shared = query.shape[1] != key.shape[1]
    windowed = asked.window is not None and asked.window < length
    if query.is_cuda and shared:  # where sdpa would fall to its slowest form
        key, value = (_for_each_head(states, query) for states in (key, value))
        shared = False
    if not query.is_cuda and asked.softcap is None and 0 < asked.dropout < 1:
        if shared:
            key, value = (_for_each_head(states, query) for states in (key, value))
        seen = _seen(length, asked, query.device) if windowed or asked.causal else None
        return DroppedAttention.apply(query, key, value, seen, asked.scaling, asked.dropout)
    if asked.softcap is None and (query.is_cuda or length > SHORT):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_seen(length, asked, query.device) if windowed else None,
            dropout_p=asked.dropout,
            is_causal=asked.causal and not windowed,
            scale=asked.scaling,
            enable_gqa=shared,
        )
    if shared:
        key, value = (_for_each_head(states, query) for states in (key, value))
    scores = (query * asked.scaling) @ key.transpose(2, 3)  # [n, H, L, L]
    if asked.softcap is not None:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    if windowed or asked.causal:
        scores = scores.masked_fill(~_seen(length, asked, query.device), -math.inf)
    kind = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=kind).to(value.dtype)
    if asked.dropout > 0:
        weights = F.dropout(weights, asked.dropout)
    return weights @ value


def _seen(length: int, asked: Asked, device: torch.device) -> Tensor:
    """Which keys (columns) a query (row) sees, [L, L] bool."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    before = after = length
    if asked.window is not None:
        before, after = _sides(asked.window, asked.causal)
    return seen.triu_(-before).tril_(0 if asked.causal else after)


# --- which one ---

# The best first. flash-attn 4 has windows and softcap forward, but not in every backward.
KERNELS = (
    Kernel("flash_attention_4", "packed_fa4", partial(_flash, "flash_attn.cute"), "flash-attn-4",
           capability=(9, 0), head_dim=128, window=False, softcap=False, dropout=False),
    Kernel("flash_attention_3", "packed_fa3", partial(_flash, "flash_attn_interface"),
           "flash-attn-3", capability=(9, 0), dropout=False),
    Kernel("flash_attention_2", "packed_fa2", partial(_flash, "flash_attn"), "flash-attn",
           capability=(8, 0)),
    Kernel("varlen_attn", "packed_varlen", _varlen, capability=(8, 0), softcap=False,
           dropout=False),
    Kernel("sdpa", "packed_by_text", lambda: _by_text),
)  # fmt: skip


def find_kernels(needs: Needs) -> list[Kernel]:
    """Those that can serve here, the best first; the last serves anywhere."""
    return [kernel for kernel in KERNELS if kernel.why_not(needs) is None]


def register(kernel: Kernel) -> str:
    """Tell transformers of the kernel; the name it then goes by there.

    ImportError, OSError: its package is installed and broken.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(kernel.alias, partial(packed_attention, kernel.make()))
    return kernel.alias


def why_not_packed(backbone: "PreTrainedModel") -> str | None:
    """What in the backbone's build rules packing out; None if nothing does."""
    takes = inspect.signature(backbone.forward).parameters
    if "position_ids" not in takes:
        return "it counts the positions of tokens itself"
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    if not (passes_on and backbone.is_backend_compatible()):
        return "its attention cannot be replaced"
    layers = set(getattr(backbone.config.get_text_config(), "layer_types", None) or [])
    if others := sorted(layers - {"full_attention", "sliding_attention"}):
        return f"it has layers of the kind {others[0]}"
    return None


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
