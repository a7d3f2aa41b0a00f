"""A model name and settings -> an Encoder on a device.

What can be wrong is found before weights load: the backbone is first built without storage, which
costs milliseconds and tells which attention works, how many positions there are, and whether tokens
see only those before them. That is the skeleton.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.adapter import Adapter, find_adapter
from rankpo_fast.model.attention import (
    KERNELS,
    Kernel,
    Needs,
    Unpackable,
    find_kernels,
    why_not_packed,
)
from rankpo_fast.model.backbone_config import Code, load_config
from rankpo_fast.model.check import check_packing
from rankpo_fast.model.directories import (
    MODEL_FLAG,
    blaming,
    check_config,
    check_size,
    check_weights,
    check_whole,
    find_directory,
    has_tokenizer,
    weights_dtype,
)
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.float8 import use_float8
from rankpo_fast.model.liger import use_liger
from rankpo_fast.model.lora import Lora, add_lora, four_bits, keep_four_bits, whole_weights
from rankpo_fast.model.modules import backbone_folder
from rankpo_fast.model.precision import Precision
from rankpo_fast.model.reading import find_settings, is_causal
from rankpo_fast.model.reshape import backbone_is_cut, check_bidirectional, freeze, reshape
from rankpo_fast.model.settings import has_settings
from rankpo_fast.model.tokenizer import (
    add_special_tokens,
    append_eos,
    check_vocabulary,
    embedding_rows,
    load_tokenizer,
    lower_cased,
    tokenizer_flag,
    vocabulary_size,
)
from rankpo_fast.model.trainable import set_layers
from rankpo_fast.threads import fit_threads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION_DROPOUTS = ["attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"]
META = torch.device("meta")


def load_encoder(
    config: EncoderConfig,
    *,
    device: torch.device,
    seed: int = 0,
    weights: torch.device | None = None,
) -> Encoder:
    """Load the encoder that `config` describes, in eval mode, weights in fp32.

    Args:
        config: what to load; a ModelConfig also says how it is to be trained.
        device: where it computes.
        seed: of weights that no file gives: new tokens, or all of them from scratch.
        weights: where they lie first, if not there: on the host, to be moved part by part; on the
            meta device, which has none, so that no file is read: another process sends them. What
            only computing finds out then waits for `Encoder.on_device`.

    Raises:
        InputError: no such model or tokenizer, unsafe or incomplete files, or settings that this
            model cannot be used with; the message names the flag. Also where packing changes what
            the model computes, which a few texts find out.
    """
    if device.type == "cpu":
        fit_threads()
    training = config if isinstance(config, ModelConfig) else None
    precision = Precision.of_model(config, device)
    if config.bf16 == "auto" and training is None:  # a training run says it at its start
        warnings.warn(f"--bf16 auto: vectors are computed in {precision}", stacklevel=2)
    config = dataclasses.replace(config, bf16=precision.bf16)
    from_scratch = training is not None and training.from_scratch
    directory = find_directory(config.model_name_or_path, MODEL_FLAG, weights=not from_scratch)
    own_folder = folder = backbone_folder(directory)
    origins = [directory, folder]
    adapter = find_adapter(folder, MODEL_FLAG)
    if adapter is not None:
        folder = adapter.base_folder
        origins += [adapter.base_directory, folder]
        directory = directory if has_settings(directory) else adapter.base_directory
    check_config(folder, MODEL_FLAG)
    files = [] if from_scratch else check_weights(folder, MODEL_FLAG)
    check_whole(files, MODEL_FLAG)
    backbone_config = load_config(folder, Code.of(config))
    if training is not None:
        reshape(backbone_config, training)
        if training.disable_dropout:
            drop_nothing(backbone_config)
    skeleton = _skeleton(backbone_config, config)
    if files:
        check_size(files, sum(p.numel() for p in skeleton.parameters()), MODEL_FLAG)
    if training is not None:
        check_bidirectional(skeleton, is_causal(skeleton), training)
    attention, kernels = _choose_attention(backbone_config, config, skeleton, device)
    tokenizer = load_tokenizer(
        config, own_folder if has_tokenizer(own_folder) else folder, backbone_config
    )
    settings = find_settings(config, directory, skeleton, tokenizer)
    if settings.lower_case:
        tokenizer = lower_cased(tokenizer)
    if settings.append_eos:
        append_eos(tokenizer, asked=config.append_eos is True)

    lie = device if weights is None else weights
    storage = _storage(training, lie, precision)
    lora = None if training is None else Lora.of(training, adapter, folder, storage["dtype"])
    with _seeded(seed, device):
        if from_scratch or lie == META:  # where it will be: the host may be slow, or lack room
            backbone = _new_backbone(backbone_config, attention, lie, storage["dtype"])
        else:
            backbone = _load_backbone(
                folder, backbone_config, attention, storage, fewer=backbone_is_cut(training)
            )
            _unmap(backbone)
            check_whole(files, MODEL_FLAG)  # it may have been written over meanwhile
            check_vocabulary(tokenizer, backbone, tokenizer_flag(config))
        if adapter is not None and lora is not None:
            adapter.put_on(backbone, trained=True)
        elif adapter is not None and lie != META:
            backbone = _merge(adapter, backbone, lambda dtype: _load_backbone(
                folder, backbone_config, attention, four_bits(lie, dtype)
            ))  # fmt: skip
        if training is not None:
            add_special_tokens(tokenizer, training.special_tokens)
        new_tokens = _fit_embedding(backbone, tokenizer)
        if training is not None and lora is not None and adapter is None:
            add_lora(backbone, training)
    if training is not None:
        freeze(backbone, training)
        _check_new_tokens(backbone, new_tokens)
        use_float8(backbone, training, device)
    encoder = Encoder(backbone, tokenizer, settings, bf16=precision.bf16).to(lie).eval()
    if lora is not None:  # new rows of the embedding are in no directory
        encoder.lora = dataclasses.replace(lora, base=None) if new_tokens else lora
    encoder.save_dtype, encoder.origins = _save_dtype(training, files), origins
    encoder.name = config.model_name_or_path
    if training is not None:
        use_liger(backbone, training.use_liger_kernel, device)
    encoder.waiting = partial(_try_out, encoder, kernels, config)
    if weights is None:
        encoder.on_device()
    return encoder


def _try_out(encoder: Encoder, kernels: list[Kernel], config: EncoderConfig) -> None:
    """What takes passes through the encoder to find out."""
    if kernels:
        _pack(encoder, kernels, config)
    if isinstance(config, ModelConfig):
        set_layers(encoder, config)


# --- the backbone ---


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers on the host and the device from `seed`; then as if none had been drawn."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def drop_nothing(config: "PreTrainedConfig") -> None:
    """Set every dropout of the config to 0, before anything is built from it."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and type(value) in (int, float):
                setattr(part, name, 0.0)


def _skeleton(backbone_config: "PreTrainedConfig", config: EncoderConfig) -> "PreTrainedModel":
    """The backbone on the meta device: attention sdpa where the backbone has it, else eager."""
    attention = "eager" if _softcap(backbone_config) else None  # which older versions leave out
    with blaming(f"{MODEL_FLAG} {config.model_name_or_path}"):
        return _new_backbone(backbone_config, attention, "meta")


def _new_backbone(
    config: "PreTrainedConfig",
    attention: str | None,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    from transformers import AutoModel

    with torch.device(device):
        return AutoModel.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )


def _storage(
    training: ModelConfig | None, device: torch.device, precision: Precision
) -> dict[str, Any]:
    """How weights lie in memory, as transformers takes it."""
    kind = "fp32" if training is None else training.weights_dtype
    dtype = torch.bfloat16 if kind != "fp32" and precision.bf16 else torch.float32
    return four_bits(device, dtype) if kind == "nf4" else {"dtype": dtype}


def _load_backbone(
    folder: Path,
    config: "PreTrainedConfig",
    attention: str,
    storage: dict[str, Any],
    *,
    fewer: bool = False,
) -> "PreTrainedModel":
    """`fewer`: of the layers in the files the first ones are wanted."""
    from transformers import AutoModel

    with blaming(f"{MODEL_FLAG} {folder}"):
        backbone, report = AutoModel.from_pretrained(
            folder,
            config=config,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **storage,
        )
    # What does not fit transformers leaves random; only a pooler, which we do not use, may be so.
    unfit = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    unfit = sorted(key for key in unfit if not key.startswith("pooler."))
    if unfit:
        raise InputError(f"{MODEL_FLAG} {folder}: {len(unfit)} tensors that config.json asks for "
                         f"are not there in that shape: {unfit[0]} ...")  # fmt: skip
    keep_four_bits(backbone)
    if not fewer:
        _check_surplus(folder, backbone, report["unexpected_keys"])
    return backbone


def _unmap(backbone: "PreTrainedModel") -> None:
    """Weights on the host leave the mapped file for memory of their own: whoever cuts that file
    later would end this process."""
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def _check_surplus(folder: Path, backbone: "PreTrainedModel", names: Iterable[str]) -> None:
    """InputError if the weights have more layers than the model; heads of other tasks are free."""
    kinds = {re.sub(r"\d+", "#", name) for name in backbone.state_dict()}
    head = f"{backbone.base_model_prefix}."
    more = [n for n in sorted(names) if re.sub(r"\d+", "#", n.removeprefix(head)) in kinds]
    if more:
        raise InputError(f"{MODEL_FLAG} {folder}: {len(more)} tensors have no place in "
                         f"config.json, which has fewer layers: {more[0]} ...")  # fmt: skip


def _merge(
    adapter: Adapter,
    backbone: "PreTrainedModel",
    in_four_bits: Callable[[torch.dtype], "PreTrainedModel"],
) -> "PreTrainedModel":
    """`in_four_bits` loads the backbone so, for an adapter that was trained beside such weights."""
    with blaming(f"{MODEL_FLAG} {adapter}"):
        if adapter.four_bits is not None:
            beside = in_four_bits(adapter.four_bits)
            adapter.put_on(beside)
            backbone.load_state_dict(whole_weights(beside))
        else:
            backbone = adapter.merged_into(backbone)
    warnings.warn(f"{MODEL_FLAG} {adapter} is merged into it: what is trained and saved is the "
                  f"whole model", stacklevel=3)  # fmt: skip
    return backbone


def _save_dtype(training: ModelConfig | None, weights: list[Path]) -> torch.dtype:
    """As asked for, else that of the weights, fp32 where there are none."""
    if training is not None and training.save_dtype != "auto":
        return getattr(torch, training.save_dtype)
    return weights_dtype(weights)


def _fit_embedding(backbone: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Add rows for new tokens, drawn as the backbone draws its own initial weights; how many."""
    size, rows = vocabulary_size(tokenizer), embedding_rows(backbone)
    if size > rows:
        backbone.resize_token_embeddings(size, mean_resizing=False)
    return max(0, size - rows)


def _check_new_tokens(backbone: "PreTrainedModel", count: int) -> None:
    """InputError where rows of new tokens would stay as they were drawn."""
    table = backbone.get_input_embeddings()
    if count and not any(p.requires_grad for p in table.parameters()):
        [name] = [name for name, module in backbone.named_modules() if module is table]
        raise InputError(f"--special_tokens: {count} new rows of the embedding would never be "
                         f"trained; with --lora_rank give --lora_modules_to_save "
                         f"{name.rpartition('.')[2]}, else no --freeze_embeddings")  # fmt: skip


# --- its attention ---


def _choose_attention(
    backbone_config: "PreTrainedConfig",
    config: EncoderConfig,
    skeleton: "PreTrainedModel",
    device: torch.device,
) -> tuple[str, list[Kernel]]:
    """What transformers computes padded texts with, and kernels for packed ones, the best first.

    There are none where texts are to be padded; the user hears why, unless asked for.
    """
    default = skeleton.config._attn_implementation
    asked = config.attn_implementation
    needs = _needs(backbone_config, config, skeleton, device)
    kernels = find_kernels(needs)
    if asked not in ("auto", "eager"):
        [kernel] = [kernel for kernel in KERNELS if kernel.name == asked]
        if reason := kernel.why_not(needs):
            raise InputError(f"--attn_implementation {asked}: {reason}; {kernels[0].name} "
                             f"works here")  # fmt: skip
        kernels = [kernel]
    if config.packing:
        reason = "eager attention is for padded texts" if asked == "eager" else None
        reason = reason or why_not_packed(skeleton)
        if reason is None:
            _warn_of_dropout(needs, kernels, asked)
            return default, kernels
        _warn_of_padding(config, reason)
    if asked == "varlen_attn":
        raise InputError(f"--attn_implementation {asked} is for packed texts, which these are not; "
                         f"{default} works here")  # fmt: skip
    if asked != "auto":
        with blaming(f"--attn_implementation {asked} cannot be used ({default} can)"):
            _new_backbone(backbone_config, asked, "meta")
        return asked, []
    for kernel in kernels:
        if "flash" in kernel.name:
            try:
                _new_backbone(backbone_config, kernel.name, "meta")
            except (ImportError, ValueError):  # not for this backbone
                continue
            return kernel.name, []
    return default, []


def _needs(
    backbone_config: "PreTrainedConfig",
    config: EncoderConfig,
    skeleton: "PreTrainedModel",
    device: torch.device,
) -> Needs:
    text = backbone_config.get_text_config()
    training = isinstance(config, ModelConfig)
    heads = getattr(text, "num_attention_heads", 1)
    dims = [dim for m in skeleton.modules() if isinstance(dim := getattr(m, "head_dim", 0), int)]
    return Needs(
        device=device,
        half=bool(config.bf16),  # "auto" was decided before
        head_dim=max(dims) or text.hidden_size // heads,  # not all layers need have the same
        window=bool(getattr(text, "sliding_window", None)),
        softcap=_softcap(backbone_config),
        dropout=training and any(getattr(text, name, 0) for name in ATTENTION_DROPOUTS),
    )


def _softcap(config: "PreTrainedConfig") -> bool:
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def _pack(encoder: Encoder, kernels: list[Kernel], config: EncoderConfig) -> None:
    """Let the encoder pack with the first kernel that loads, once it has been checked."""
    for kernel in kernels:
        try:
            encoder.use_kernel(kernel)
        except (ImportError, OSError) as error:  # installed, but not for this Python, torch or CUDA
            broken = f"--attn_implementation {kernel.name}: {kernel.distribution} does not load"
            if config.attn_implementation != "auto":
                raise InputError(f"{broken} ({error}); sdpa works here") from error
            warnings.warn(f"{broken} ({error})", stacklevel=3)
            continue
        try:
            check_packing(encoder, kernel)
        except Unpackable as reason:
            encoder.use_kernel(None)
            _warn_of_padding(config, str(reason))
        return


def _warn_of_padding(config: EncoderConfig, reason: str) -> None:
    warnings.warn(
        f"{MODEL_FLAG} {config.model_name_or_path}: texts are padded to others of similar length "
        f"rather than packed: {reason} (--packing false asks for that)",
        stacklevel=4,
    )


def _warn_of_dropout(needs: Needs, kernels: list[Kernel], asked: str) -> None:
    """Attention dropout alone can keep the fast kernels of a GPU away."""
    best = find_kernels(dataclasses.replace(needs, dropout=False))[0]
    if asked == "auto" and best is not kernels[0]:
        warnings.warn(
            f"dropout in attention is computed by {kernels[0].name}; --disable_dropout true makes "
            f"it {best.name}, which is faster",
            stacklevel=4,
        )
