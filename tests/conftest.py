"""Fixtures all rooms share: a tokenizer and two model directories, tiny, made on the fly.

Without a GPU, Triton's kernels run in its interpreter, which has to be chosen here.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

# Triton reads the variable when its own `tl.sum` and our kernels are decorated: one mode a process.
assert "triton" not in sys.modules, "triton was imported before tests/conftest.py set its mode"
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ["TRITON_INTERPRET"] = "1"

SENTENCES = [
    "a senior data engineer in Berlin builds pipelines",
    "the nurse in Lyon cares for patients at night",
    "we are looking for a teacher of mathematics",
    "software developer with ten years of experience in Python",
]


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=10,
        help="of tests/train/test_kills.py, at random moments; with 50, at every system call too, "
        "and not at every fifth",
    )  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small lose time to threads, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def interpreted():
    """Whether kernels run in the interpreter, which then has bf16 right; else they are compiled."""
    import triton  # 0.8 s, which most tests do without

    if not triton.knobs.runtime.interpret:
        yield False
        return
    from support.interpreter import exact_bf16

    with exact_bf16():
        yield True


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE of 320 tokens: nothing is unknown; `<s> text </s>`, padded on the right."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A causal backbone of 2 layers and 32 dims, saved by transformers with its tokenizer."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    return _save(config, tiny_tokenizer, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A bidirectional backbone of 2 layers and 32 dims, with dropout and a pooler."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    return _save(config, tiny_tokenizer, tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def uncased_llama_dir(tmp_path_factory, tiny_llama_dir) -> Path:
    """`tiny_llama_dir` with a tokenizer that drops case and zero-width spaces."""
    directory = shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("uncased") / "model")
    path = directory / "tokenizer.json"
    lower, drop = {"type": "Lowercase"}, {"type": "Replace", "pattern": {"String": "\u200b"}}
    normalizer = {"type": "Sequence", "normalizers": [lower, {**drop, "content": ""}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))
    return directory


def _save(config, tokenizer, directory: Path) -> Path:
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
