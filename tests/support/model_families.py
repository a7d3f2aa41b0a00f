"""A tiny backbone of every family that is packed, and a batch of texts for them.

Sliding windows are shorter than the texts, and positions fewer than the tokens of a batch.
"""

import torch

from rankpo_fast.data.packing import MicroBatch, pack
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.settings import EncoderSettings

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | IDS | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LOCAL_THEN_GLOBAL = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 7,
                                  "max_window_layers": 1}),
    "qwen3": ("Qwen3", HEADS),
    "mistral": ("Mistral", HEADS | {"sliding_window": 7}),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", HEADS | {"sliding_window": 7, "attn_logit_softcapping": 2.0,
                                  "query_pre_attn_scalar": 5}),
    "gemma3": ("Gemma3Text", HEADS | {"sliding_window": 7, "layer_types": LOCAL_THEN_GLOBAL}),
    "gemma3-bidirectional": ("Gemma3Text", HEADS | {"sliding_window": 12,
                                                    "layer_types": LOCAL_THEN_GLOBAL,
                                                    "use_bidirectional_attention": True}),
    "bert": ("Bert", SIZES | NO_DROPOUT),
    "roberta": ("Roberta", SIZES | IDS | NO_DROPOUT),
    "xlm-roberta": ("XLMRoberta", SIZES | IDS | NO_DROPOUT | {"pad_token_id": 3}),
    "modernbert": ("ModernBert", SIZES | IDS | {"local_attention": 8, "cls_token_id": 1,
                                                "global_attn_every_n_layers": 2,
                                                "sep_token_id": 2}),
    "gpt2": ("GPT2", SIZES | IDS | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}  # fmt: skip
LENGTHS = (50, 41, 33, 20, 20, 20, 9, 9, 8, 3, 1)  # both sides of attention.SHORT, windows + 1


class Padding:
    """All that an encoder asks of its tokenizer here."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id


def make_encoder(family: str, dtype: torch.dtype = torch.float32, **changes) -> Encoder:
    """An encoder that pads, its weights large enough for attention to be far from uniform."""
    import transformers

    kind, sizes = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
        backbone = transformers.AutoModel.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
        for parameter in backbone.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    settings = EncoderSettings("mean", "", "", max_query_length=60, max_passage_length=60)
    return Encoder(backbone, Padding(config.pad_token_id), settings).eval()


def make_batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> MicroBatch:
    """Texts of random ids, none of which is a padding token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 320, (sum(lengths),), generator=generator, dtype=torch.int32)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return pack(TokenTable(ids, offsets, truncated=0), torch.arange(len(lengths)))
