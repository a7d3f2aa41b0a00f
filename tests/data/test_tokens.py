"""Token tables hold what the tokenizer gives; the cache is exact."""

import contextlib
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rankpo_fast.data import tokens
from rankpo_fast.data.tokens import TokenTable, joined, tokenize
from rankpo_fast.errors import InputError

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"]
TEXTS = ["a b c", "a", "b c d e f g h i j", "a b c d", "a b c d e"]


def make_tokenizer(words=WORDS, special=True, **options):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **options
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def rows_of(table):
    return [table[i].tolist() for i in range(len(table))]


def same(one, other):
    return rows_of(one) == rows_of(other) and one.truncated == other.truncated


# --- the table ---


@pytest.mark.parametrize("prefix", ["", "j: "])
@pytest.mark.parametrize("max_length", [6, 11, 50])
def test_ids_are_what_the_tokenizer_gives(tiny_tokenizer, prefix, max_length):
    table = tokenize(TEXTS, tiny_tokenizer, max_length, prefix=prefix)
    texts = [prefix + text for text in TEXTS]
    expected = tiny_tokenizer(texts, truncation=True, max_length=max_length)
    assert rows_of(table) == expected["input_ids"]
    full = tiny_tokenizer(texts)["input_ids"]
    assert table.truncated == sum(len(ids) > max_length for ids in full)
    assert table.lengths.tolist() == [min(len(ids), max_length) for ids in full]
    assert (table.ids.dtype, table.offsets.dtype) == (torch.int32, torch.int64)


def test_truncation_keeps_the_special_tokens(tokenizer):
    table = tokenize(TEXTS, tokenizer, 4)
    assert {(ids[0], ids[-1]) for ids in rows_of(table)} == {(1, 2)}


def test_text_of_just_the_maximum_length_is_not_truncated(tokenizer):
    assert tokenize(["a b c"], tokenizer, 5).truncated == 0
    assert tokenize(["a b c"], tokenizer, 4).truncated == 1


def test_tokenizer_that_cuts_on_the_left_may():
    table = tokenize(["a b c d"], make_tokenizer(truncation_side="left"), 4)
    assert rows_of(table) == [[1, WORDS.index("c"), WORDS.index("d"), 2]]


class WordTokenizer:
    """Stands for a tokenizer written in Python: its encodings keep nothing of what was cut."""

    truncation_side = "right"

    def __init__(self, fast):
        self.fast = fast

    def num_special_tokens_to_add(self):
        return 2

    def __call__(self, texts, **options):
        encoded = self.fast(texts, **options)
        encoded._encodings = None
        return encoded


def test_tokenizer_written_in_python_gives_the_same_table(tokenizer):
    for max_length in (5, 6, 50):
        table = tokenize(TEXTS, WordTokenizer(tokenizer), max_length)
        assert same(table, tokenize(TEXTS, tokenizer, max_length))


def test_slices_are_joined_in_order(tokenizer, monkeypatch):
    whole = tokenize(TEXTS, tokenizer, 6)
    monkeypatch.setattr(tokens, "SLICE", 2)
    assert same(tokenize(TEXTS, tokenizer, 6), whole)


def test_no_texts_give_an_empty_table(tokenizer):
    table = tokenize([], tokenizer, 6)
    assert (len(table), table.truncated, table.lengths.tolist()) == (0, 0, [])


def test_no_room_beside_the_special_tokens_is_refused(tokenizer):
    with pytest.raises(InputError, match="maximum length of 2 .* adds 2 special"):
        tokenize(TEXTS, tokenizer, 2)


def test_a_prefix_that_leaves_no_room_for_text_is_refused(tokenizer):
    assert rows_of(tokenize(["c d"], tokenizer, 5, prefix="a b "))[0][3] == WORDS.index("c")
    with pytest.raises(InputError, match="maximum length of 4 .* prefix 'a b ' takes 4"):
        tokenize(["c d"], tokenizer, 4, prefix="a b ")


def test_text_without_tokens_is_refused():
    with pytest.raises(InputError, match="no token of the text '\\\\u2003'"):
        tokenize(["a", "\u2003"], make_tokenizer(special=False), 5)


# --- the cache ---


@pytest.fixture
def count_calls(monkeypatch):
    calls = []
    real = tokens._tokenize
    monkeypatch.setattr(tokens, "_tokenize", lambda *args: calls.append(1) or real(*args))
    return calls


def test_cache_gives_the_same_table_without_tokenising(tokenizer, tmp_path, count_calls):
    first = tokenize(TEXTS, tokenizer, 6, prefix="j ", cache_dir=tmp_path)
    tokenizer(TEXTS, truncation=True, max_length=3, padding=True)  # leaves its mark in the backend
    again = tokenize(TEXTS, tokenizer, 6, prefix="j ", cache_dir=tmp_path)
    assert same(first, again) and len(count_calls) == 1
    assert again.ids.dtype == torch.int32
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"texts": TEXTS[:-1]}, id="texts"),
        pytest.param({"texts": TEXTS[::-1]}, id="their-order"),
        pytest.param({"texts": ["a b ", "ca", *TEXTS[2:]]}, id="where-one-ends"),
        pytest.param({"max_length": 7}, id="length"),
        pytest.param({"prefix": "j"}, id="prefix"),
        pytest.param({"tokenizer": make_tokenizer(WORDS[::-1])}, id="vocabulary"),
        pytest.param({"tokenizer": make_tokenizer(special=False)}, id="special-tokens"),
        pytest.param({"tokenizer": make_tokenizer(truncation_side="left")}, id="truncation-side"),
    ],
)
def test_another_input_is_another_cache_entry(tokenizer, tmp_path, change):
    arguments = {"texts": TEXTS, "tokenizer": tokenizer, "max_length": 6, "prefix": ""}
    tokenize(**arguments, cache_dir=tmp_path)
    table = tokenize(**arguments | change, cache_dir=tmp_path)
    assert same(table, tokenize(**arguments | change))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda kept: kept["ids"].__setitem__(3, len(WORDS)), id="beyond-the-vocabulary"
        ),
        pytest.param(lambda kept: kept["ids"].__setitem__(0, -1), id="negative"),
        pytest.param(lambda kept: kept["offsets"].__setitem__(1, 99), id="beyond-the-ids"),
        pytest.param(lambda kept: kept["offsets"].__setitem__(1, 0), id="a-text-without-tokens"),
        pytest.param(lambda kept: kept.update(ids=kept["ids"].long()), id="other-numbers"),
        pytest.param(lambda kept: kept.update(offsets=kept["offsets"][:-1]), id="fewer-texts"),
        pytest.param(lambda kept: kept.pop("truncated"), id="a-tensor-missing"),
        pytest.param(
            lambda kept: kept.update(truncated=torch.tensor(-1)), id="cut-fewer-than-none"
        ),
    ],
)
def test_impossible_tables_are_made_anew_whatever_their_checksum(
    change, tokenizer, tmp_path, monkeypatch
):
    """Whoever can write into the cache can make the checksum right."""
    table = tokenize(TEXTS, tokenizer, 6)
    kept = {"ids": table.ids.clone(), "offsets": table.offsets.clone()}
    kept["truncated"] = torch.tensor(table.truncated)
    change(kept)
    with monkeypatch.context() as patches:
        real = tokens.cached
        patches.setattr(tokens, "cached", lambda *args: real(*args[:3], lambda: kept, args[4]))
        with contextlib.suppress(KeyError):
            tokenize(TEXTS, tokenizer, 6, cache_dir=tmp_path)
    for said in (1, 0):
        with warnings.catch_warnings(record=True) as warned:
            assert same(tokenize(TEXTS, tokenizer, 6, cache_dir=tmp_path), table)
        assert len(warned) == said


# --- joined tables ---


def test_joined_tables_hold_equal_texts_once():
    parts = [([1, 2, 1, 2, 3], [0, 2, 5], 1), ([1, 2, 3, 1], [0, 3, 4], 2)]
    tables = [
        TokenTable(torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets), truncated)
        for ids, offsets, truncated in parts
    ]
    table, rows = joined(*tables)
    assert [row.tolist() for row in rows] == [[0, 1], [1, 2]]
    assert [table[i].tolist() for i in range(len(table))] == [[1, 2], [1, 2, 3], [1]]
    assert (table.ids.dtype, table.truncated) == (torch.int32, 3)
