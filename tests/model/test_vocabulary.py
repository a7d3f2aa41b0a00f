"""A trimmed vocabulary: its texts keep tokens and vectors, others get tokens that there are."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model import vocabulary
from rankpo_fast.model.encoder import first_position
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.vocabulary import trim_vocabulary, trimmed_json
from support.model_families import FAMILIES

CPU = torch.device("cpu")
STEMS = ["eng", "inee", "ring", "nur", "se", "teach", "er", "data", "pip", "line", "café", "中文"]
CORPUS = [f"{a}{b} {c}{a}, {b}" for a in STEMS for b in STEMS for c in STEMS[::3]]
QUERIES, PASSAGES = ["nurse teacher", "café"], ["data engineering pipeline", "中文 nur"]
OTHERS = ["pipeline linedata ☃ 中", "unsaid ZEBRA", "<mask> é"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # in RoBERTa's order


# --- tokenizers ---


def framed(tokenizer: Tokenizer) -> Tokenizer:
    """`<s> text </s>`, and a token of its own that the model does not know."""
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends
    )
    tokenizer.add_special_tokens(["<mask>"])
    return tokenizer


def byte_level(**options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    return framed(tokenizer)


def byte_fallback() -> Tokenizer:
    """As of Llama 2: characters that are no tokens become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=tokens, show_progress=False
    ))  # fmt: skip
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][: len(SPECIAL)]
    return framed(Tokenizer.from_str(json.dumps(saved)))


def suffixed() -> Tokenizer:
    """As of CLIP: words end with a mark."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    ))  # fmt: skip
    return framed(tokenizer)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False
    ))  # fmt: skip
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(["<mask>"])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    ))  # fmt: skip
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    return framed(tokenizer)


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(
        special_tokens=SPECIAL, show_progress=False
    ))  # fmt: skip
    return framed(tokenizer)


KINDS = {
    "byte-level": byte_level,
    "byte-level, whole words first": lambda: byte_level(ignore_merges=True),
    "byte-fallback": byte_fallback,
    "suffixed": suffixed,
    "word-piece": word_piece,
    "unigram": unigram,
    "word-level": word_level,
}


@cache
def made(kind: str) -> Tokenizer:
    return KINDS[kind]()


def trimmed_to(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tokenizer, list[int]]:
    found = {id for text in texts for id in tokenizer.encode(text).ids}
    saved, old = trimmed_json(json.loads(tokenizer.to_str()), found, ())
    return Tokenizer.from_str(json.dumps(saved)), old


def assert_same_tokens(tokenizer: Tokenizer, trimmed: Tokenizer, old: list[int], texts) -> None:
    for text in texts:
        was, now = tokenizer.encode(text), trimmed.encode(text)
        assert [old[id] for id in now.ids] == was.ids
        assert now.tokens == was.tokens
        assert [trimmed.id_to_token(id) for id in now.ids] == [
            tokenizer.id_to_token(id) for id in was.ids
        ]


WORDS = st.lists(st.sampled_from([*STEMS, "☃", "x", "Z", "é", "<mask>", " "]), max_size=8)
TEXTS = st.lists(WORDS.map("".join), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(used=TEXTS, others=TEXTS)
def test_texts_keep_their_tokens_and_others_get_legal_ones(kind, used, others):
    tokenizer = made(kind)
    trimmed, old = trimmed_to(tokenizer, used)
    assert sorted(trimmed.get_vocab().values()) == [*range(len(old))]
    assert_same_tokens(tokenizer, trimmed, old, used)
    for text in others:
        ids, was = trimmed.encode(text, text).ids, tokenizer.encode(text, text).ids
        assert max(ids) < len(old)
        if kind not in ("word-piece", "word-level"):  # where a long unknown word is one token
            assert len(ids) >= len(was)


@settings(max_examples=150, deadline=None)
@given(
    joins=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12),
    used=st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=3),
)
def test_any_order_of_merges_stays(joins, used):
    """A token may come of several merges, and of tokens that no text has."""
    vocabulary, merges = {letter: id for id, letter in enumerate("abc")}, []
    for left, right in joins:
        tokens = [*vocabulary]
        parts = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if parts not in merges:
            merges.append(parts)
            vocabulary.setdefault("".join(parts), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    assert_same_tokens(tokenizer, *trimmed_to(tokenizer, used), used)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.dictionaries(
        st.text("abc☃", min_size=1, max_size=4), st.integers(-30, -1), min_size=1, max_size=12
    ),
    used=st.lists(st.text("abc☃", min_size=1, max_size=8), min_size=1, max_size=3),
)
def test_any_scores_stay_and_the_price_of_an_unknown_character_too(pieces, used):
    scored = [("<unk>", 0.0), *((piece, float(score)) for piece, score in pieces.items())]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    assert_same_tokens(tokenizer, *trimmed_to(tokenizer, used), used)


def test_unknown_words_stay_unknown_or_the_vocabulary_is_refused():
    """`ab` goes first and leaves `c`, which nothing fits; without `ab` there is `a` and `##bc`."""
    vocabulary = {t: id for id, t in enumerate(["[UNK]", "a", "b", "c", "##b", "ab", "##bc"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"--trim_vocabulary: .*'##bc'"):
        trimmed_to(tokenizer, ["abc", "cbc"])
    trimmed, old = trimmed_to(tokenizer, ["cbc"])  # nothing unknown: nothing to go wrong
    assert_same_tokens(tokenizer, trimmed, old, ["cbc"])


def test_gaps_among_ids_close_and_unused_tokens_go():
    tokenizer = made("byte-level")
    trimmed, old = trimmed_to(tokenizer, QUERIES)
    vocabulary = trimmed.get_vocab()
    assert len(vocabulary) < tokenizer.get_vocab_size()
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys()
    assert old[-1] == tokenizer.token_to_id("<mask>")
    assert [vocabulary[token] for token in SPECIAL] == [0, 1, 2, 3]


# --- models ---

MODELS = {"llama": "byte-level", "bert": "word-piece", "xlm-roberta": "unigram",
          "modernbert": "byte-fallback"}  # fmt: skip


def model_directory(path, family: str, kind: str | None = None):
    """A tiny backbone of random weights with a tokenizer, as transformers saves them."""
    import transformers

    name, sizes = FAMILIES[family]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made(kind or MODELS[family]).to_str()),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>", model_max_length=60,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    ids = {"vocab_size": len(tokenizer) + 5, "pad_token_id": 1, "bos_token_id": 0,
           "eos_token_id": 2}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes | ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = transformers.AutoModel.from_config(config, dtype=torch.float32)
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    backbone.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load(path, **more):
    config = ModelConfig(
        str(path), bf16=False, query_prefix="find: ", max_query_length=12, max_passage_length=8,
        special_tokens=["<own>"], **more,
    )  # fmt: skip
    return load_encoder(config, device=CPU)


def vectors(encoder):
    return [
        encoder.embed(encoder.tokenize_queries(QUERIES), max_tokens=100),
        encoder.embed(encoder.tokenize_passages(PASSAGES), max_tokens=100),
    ]


@pytest.mark.filterwarnings("ignore:.*no file there names the pooling")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_vectors_stay_in_bits_and_the_saved_model_has_them(family, packing, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    library = pytest.importorskip("sentence_transformers")
    encoder = load(model_directory(tmp_path / "model", family), packing=packing)
    before, table = vectors(encoder), encoder.backbone.get_input_embeddings().weight
    of = len(table)
    parameters = sum(p.numel() for p in encoder.parameters())
    trimmed = trim_vocabulary(encoder, QUERIES, PASSAGES)
    for was, now in zip(before, vectors(encoder), strict=True):
        assert torch.equal(now, was)
    assert trimmed.of == of and trimmed.kept == len(encoder.tokenizer) < of
    assert trimmed.parameters == parameters - sum(p.numel() for p in encoder.parameters())
    assert encoder.tokenizer.convert_tokens_to_ids("<own>") < trimmed.kept
    config = encoder.backbone.config
    assert (config.vocab_size, config.pad_token_id) == (trimmed.kept, 1)
    assert encoder.encode(OTHERS).isfinite().all()

    encoder.save(tmp_path / "saved")
    again = load_encoder(EncoderConfig(str(tmp_path / "saved"), packing=packing), device=CPU)
    for was, now in zip(before, vectors(again), strict=True):
        assert torch.equal(now, was)
    unit = F.normalize(before[1], dim=1)
    theirs = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    theirs.max_seq_length = 8
    torch.testing.assert_close(torch.from_numpy(theirs.encode(PASSAGES)), unit, rtol=0, atol=1e-5)
    theirs.encode(OTHERS)
    backbone = AutoModel.from_pretrained(tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(tokenizer).__name__ == "TokenizersBackend"  # a family's class has ids of its own
    for text, expected in zip(PASSAGES, unit, strict=True):
        states = backbone(
            **tokenizer(text, truncation=True, max_length=8, return_tensors="pt")
        ).last_hidden_state[0]
        pooled = states[-1] if encoder.settings.pooling == "last" else states.mean(0)
        torch.testing.assert_close(F.normalize(pooled, dim=0), expected, rtol=0, atol=1e-5)


def test_positions_that_count_from_the_padding_token_stay(tmp_path):
    """Its id is kept by the ids before it, whether texts have them or not."""
    directory = model_directory(tmp_path, "roberta", "byte-level")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": 6}))
    encoder = load(directory, pooling="mean")
    first = first_position(encoder.backbone)
    before = vectors(encoder)
    trim_vocabulary(encoder, QUERIES, PASSAGES)
    assert first == first_position(encoder.backbone) == 7
    assert encoder.backbone.config.pad_token_id == 6
    for was, now in zip(before, vectors(encoder), strict=True):
        assert torch.equal(now, was)


def test_ids_in_the_config_follow_their_tokens_and_those_of_none_go(tmp_path):
    encoder = load(model_directory(tmp_path, "llama"), pooling="last")
    token = "ring" if "ring" in encoder.tokenizer.get_vocab() else "er"
    own = encoder.tokenizer.convert_tokens_to_ids(token)
    encoder.backbone.config.eos_token_id = [own, 2]
    encoder.backbone.config.bos_token_id = 50_000
    trim_vocabulary(encoder, ["x"], ["y"])
    config = encoder.backbone.config
    assert config.eos_token_id == [encoder.tokenizer.convert_tokens_to_ids(token), 2]
    assert config.bos_token_id is None


def test_what_is_kept_does_not_follow_from_the_order_of_texts(tmp_path):
    directory = model_directory(tmp_path, "llama")
    one, other = load(directory, pooling="last"), load(directory, pooling="last")
    trim_vocabulary(one, QUERIES, PASSAGES)
    trim_vocabulary(other, QUERIES[::-1], PASSAGES[::-1])
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert torch.equal(*(e.backbone.get_input_embeddings().weight for e in (one, other)))


# --- refusals ---


def test_a_second_table_of_tokens_is_refused_by_its_name(tmp_path):
    encoder = load(model_directory(tmp_path, "llama"), pooling="last")
    rows = encoder.backbone.get_input_embeddings().num_embeddings
    encoder.backbone.per_layer = torch.nn.Embedding(rows, 4)
    with pytest.raises(InputError, match="--trim_vocabulary: .*row for each token: per_layer"):
        trim_vocabulary(encoder, QUERIES, PASSAGES)


def test_tokenizers_that_are_not_known_are_refused(monkeypatch, tmp_path):
    encoder = load(model_directory(tmp_path, "llama"), pooling="last")
    monkeypatch.delitem(vocabulary.KINDS, "BPE")
    with pytest.raises(InputError, match="--trim_vocabulary: .* is a BPE, which cannot be trimmed"):
        trim_vocabulary(encoder, QUERIES, PASSAGES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param(
            {"post_processor": {"type": "Odd"}}, "post-processor Odd", id="post-processor"
        ),
        pytest.param(
            {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}},
            "no unknown token",
            id="no-unknown-token",
        ),
    ],
)
def test_what_cannot_be_renumbered_is_named(changes, said):
    saved = json.loads(made("unigram").to_str()) | changes
    with pytest.raises(InputError, match=f"--trim_vocabulary: .*{said}"):
        trimmed_json(saved, {0}, ())


def test_a_tokenizer_that_does_more_than_its_file_says_is_refused(tmp_path, monkeypatch):
    encoder = load(model_directory(tmp_path, "llama"), pooling="last")
    upper = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    upper["normalizer"] = {"type": "Lowercase"}  # which its class does not do
    monkeypatch.setattr(vocabulary, "_read", lambda _: upper)
    with pytest.raises(InputError, match="--trim_vocabulary: .* texts get other tokens"):
        trim_vocabulary(encoder, ["NURSE"], PASSAGES)
