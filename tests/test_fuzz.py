"""Any bytes are read as what they hold, or refused by the name of their file: by no other
exception, and at once."""

import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rankpo_fast.config import STAGES
from rankpo_fast.data.jsonl import values
from rankpo_fast.data.rows import read_contrastive, read_preferences
from rankpo_fast.demo import world
from rankpo_fast.errors import InputError
from rankpo_fast.flags import parse as parse_flags
from rankpo_fast.judge.journal import Journal
from rankpo_fast.judge.parse import Verdict, parse
from rankpo_fast.label.rule_file import RuleFile
from rankpo_fast.model.backbone_config import load_config
from rankpo_fast.model.directories import check_config, check_no_code
from rankpo_fast.model.modules import backbone_folder, read_pipeline
from rankpo_fast.sweep.spec import read_sweep

SECONDS = 30  # for one example, on a busy machine
CHECKED = settings(
    derandomize=True, database=None, deadline=None, max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
MANY = settings(CHECKED, max_examples=150)
DEEP = b"[" * 3_000 + b"]" * 3_000


@pytest.fixture(autouse=True)
def no_hang():
    """TimeoutError once one example takes too long."""

    def end(*_):
        raise TimeoutError(f"{SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(reader: Callable, *args):
    """What it gives, or its InputError; nothing else may come."""
    signal.alarm(SECONDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return reader(*args)
        except InputError as error:
            return error


# --- bytes: any, and those of good files with something wrong in them ---

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
    st.sampled_from(["inf", "nan", "-1", "0", "1e999", "9" * 5000, "<seed>", "\ud800", "\0"]),
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@st.composite
def damaged(draw, contents: list[bytes]) -> bytes:
    """One of them with some of its bytes replaced, taken away or repeated."""
    content = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        piece = draw(
            st.sampled_from(
                [b"", b"\xff", b"[", b"{", b"}", b":", b"-", b"&a ", b"*a", b"\n", b"\t"]
            )
            | st.binary(max_size=4)
            | st.just(content[start:end] * 2)
        )
        content = content[:start] + piece + content[end:]
    return content


@st.composite
def changed(draw, good: dict) -> dict:
    """A good object with another value, or another key, somewhere in it."""
    row = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 3))):
        place = row
        while True:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(anything)
            break
        if isinstance(place, dict) and draw(st.booleans()):
            place[draw(st.text(max_size=5))] = draw(anything)
    return row


def encoded(value) -> bytes:
    return json.dumps(value).encode()


# --- rows ---

ROWS = [
    {"query": "a", "positives": ["b"], "negatives": ["c", {"title": "d", "text": "e"}]},
    {"query": {"text": "a"}, "positives": {"text": ["b"]}},
    {"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": ["d"]},
    {"query": "a", "passage1": "b", "passage2": "c", "preferred": "A", "confidence_score": 80},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
]
row_bytes = (
    st.binary()
    | damaged([b"\n".join(map(encoded, ROWS)), b"\xef\xbb\xbf" + encoded(ROWS[0])])
    | st.lists(st.sampled_from(ROWS).flatmap(changed), min_size=1, max_size=3).map(
        lambda rows: b"\n".join(map(encoded, rows))
    )
)


def lines_by_json(content: bytes) -> list | None:
    """Of every line that is not blank; None if there is none, or one that json does not read."""
    try:
        texts = [line.decode() for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
        return [json.loads(text) for text in texts if text.strip()] or None
    except (ValueError, RecursionError):
        return None


def names(error: InputError, path: Path) -> bool:
    return str(error).startswith((f"{path}:", f"{path} "))


@CHECKED
@example(content=DEEP)
@example(content=b'{"query": "\\ud800", "positives": ["b"]}')
@example(content=b"1" * 5000)
@example(content=b"\x1f\x8b\x08")
@example(content=b"\x28\xb5\x2f\xfd")
@given(content=row_bytes)
def test_rows_are_what_json_says_or_refused_by_their_line(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    got = read(lambda: [value for _, value in values(path)])
    if isinstance(got, InputError):
        assert names(got, path) and lines_by_json(content) is None
    else:
        assert repr(got) == repr(lines_by_json(content))
    for reader in (read_contrastive, read_preferences):
        rows = read(reader, path)
        assert names(rows, path) if isinstance(rows, InputError) else len(rows) == len(got)


# --- YAML ---

SWEEP = b"""start: m
methods: {SFT: {sft_weight: 1.0}, RankPO: {beta: 2, grid: {rankpo_weight: [1, 2]}, alphas: [0.5]}}
settings: {train_data: [a, b], max_steps: 3}
grid: {learning_rate: [1e-4, 3e-4], warmup_ratio: [0.1]}
draws: 1
seeds: [0, 1]
alphas: [0.5, 1]
validation: {preference_data: c}
choose: {alignment: 1}
"""
CONFIG = b"model_name_or_path: m\ntrain_data: [a, b]\noutput_dir: out\nmax_steps: 3\n"
# Each level twice the last one: what writes it out never ends.
LAUGHS = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
)
LAUGH = b", ".join(b"&b%d [*b%d, *b%d]" % (n, n - 1, n - 1) for n in range(1, 40))
LAUGH = b"[&b0 [x, x], " + LAUGH + b"]"
MERGES = b"a0: &a0 {x: 1}\n" + b"".join(
    b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
)
RULES = world.RULES.encode()
HEAD, RULE = RULES[: RULES.index(b"rules:\n")], b"rules:\n- any: &p0 [{same: region}]\n"
PARTS = b"".join(
    b"- any: &p%d [{any: *p%d}, {any: *p%d}]\n" % (n, n - 1, n - 1) for n in range(1, 15)
)
YAML = [
    pytest.param(read_sweep, [SWEEP], "--sweep {}", id="sweep"),
    pytest.param(RuleFile.read, [RULES], "{}", id="label"),
    pytest.param(
        lambda path: parse_flags("contrastive", "x", STAGES["contrastive"], [f"--config={path}"]),
        [CONFIG], "", id="config",
    ),
]  # fmt: skip


def refused_or_read(reader: Callable, path: Path, content: bytes, named: str) -> None:
    path.write_bytes(content)
    got = read(reader, path)
    assert not isinstance(got, InputError) or str(got).startswith(named.format(path)), got


@pytest.mark.long
@pytest.mark.parametrize("reader, good, named", YAML)
@MANY
@given(data=st.data())
def test_any_yaml_is_read_or_refused_by_its_file(reader, good, named, data, tmp_path):
    content = data.draw(damaged(good) | damaged(good) | st.binary(max_size=64))
    refused_or_read(reader, tmp_path / "file.yaml", content, named)


@pytest.mark.parametrize("reader, good, named", YAML)
@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(DEEP, id="deep"),
        pytest.param(b"{a: " * 3_000, id="deep-keys"),
        pytest.param(b"&a [*a]", id="in-itself"),
        pytest.param(b"rules: &a\n- all: *a\nqueries: 1\nitems: 1\n", id="rule-in-itself"),
        pytest.param(LAUGHS, id="laughs"),
        pytest.param(SWEEP.replace(b"[a, b]", LAUGH), id="laughs-in-settings"),
        pytest.param(SWEEP.replace(b"[0.1]", LAUGH), id="laughs-in-grid"),
        pytest.param(SWEEP.replace(b"[0, 1]", LAUGH), id="laughs-in-seeds"),
        pytest.param(SWEEP.replace(b"{preference_data: c}", LAUGH), id="laughs-in-validation"),
        pytest.param(CONFIG.replace(b"[a, b]", LAUGH), id="laughs-in-config"),
        pytest.param(MERGES, id="merges-of-merges"),
        pytest.param(HEAD + RULE + PARTS, id="parts-of-parts"),
        pytest.param(HEAD + b"rules:\n- &a\n  all: [*a]\n", id="a-rule-in-itself"),
        pytest.param(b"{[1]: 2}", id="key-that-is-a-list"),
        pytest.param(b"? {a: b}\n: c", id="key-that-is-a-mapping"),
        pytest.param(b"<<: [1, 2]", id="merge"),
        pytest.param(b"!!python/object/apply:os.system [true]", id="code"),
        pytest.param(b"!!int x: !!binary '*'", id="tags"),
        pytest.param(SWEEP.replace(b"seeds: [0, 1]", b"seeds: [.inf, inf, nan]"), id="seeds"),
        pytest.param(SWEEP.replace(b"draws: 1", b"draws: inf"), id="draws"),
        pytest.param(SWEEP.replace(b"draws: 1", b"draws: -1"), id="no-draws"),
        pytest.param(SWEEP.replace(b"seeds: [0, 1]", b"seeds: []"), id="no-seeds"),
        pytest.param(
            b"start: m\nvalidation: {preference_data: c}\ngrid: {"
            + b", ".join(b"k%d: [%s1]" % (n, b"1, " * 99) for n in range(9)) + b"}",
            id="a-grid-without-end",
        ),
    ],
)  # fmt: skip
def test_odd_yaml_is_refused_at_once(odd, reader, good, named, tmp_path):
    refused_or_read(reader, tmp_path / "file.yaml", odd, named)


# --- a model's directory ---

MODEL_FILES = {
    "config.json": {
        "model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
        "vocab_size": 100, "auto_map": None, "rope_parameters": {"rope_type": "default"},
        "architectures": ["BertModel"], "hidden_act": "gelu", "dtype": "float32",
    },
    "modules.json": [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"pooling_mode": ["mean"], "word_embedding_dimension": 32},
    "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
    "config_sentence_transformers.json": {
        "prompts": {"query": "q: ", "document": ""}, "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}  # fmt: skip


def read_model(directory: Path) -> None:
    folder = backbone_folder(directory)
    read_pipeline(directory, any_pooling=False, given=())
    check_config(folder, "--model_name_or_path")
    check_no_code(folder / "config.json", "AutoModel", "--model_name_or_path")
    load_config(folder)


@pytest.mark.long
@pytest.mark.parametrize("file", MODEL_FILES)
@MANY
@given(data=st.data())
def test_any_settings_of_a_model_are_read_or_refused_by_their_file(file, data, tmp_path):
    good = MODEL_FILES[file]
    content = data.draw(damaged([encoded(good)]) | changed(good).map(encoded) | st.binary())
    for name, value in MODEL_FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if name == file else encoded(value))
    got = read(read_model, tmp_path)
    assert got is None or str(tmp_path) in str(got)


# --- judges ---

ANSWERS = [
    "**Preferred:** Candidate B\nConfidence score (0-100): 85",
    '<think>no</think> {"comparison": "x", "preferred": "A", "confidence": 70}',
    "Grade: 2", '{"grade": 3}', "Ranking: 2 > 1", "[[A]]", "2, 1", '{"ranking": [2, 1]}',
]  # fmt: skip
VERDICTS = {
    "pair": {"A", "B", "tie", None},
    "grade": {0, 1, 2, 3, None},
    "list": {(0, 1), (1, 0), None},
}
pieces = st.sampled_from([
    *" *_`\"'#>[]({}):=.,;%/\n\t-0123456789", "A", "B", "or ", "preferred", "is ", "candidate ",
    "confidence", "score", "grade", "ranking", "tie", "<think>", "</think>", "9" * 5000, "\ud800",
])  # fmt: skip


@pytest.mark.parametrize("mode", VERDICTS)
@CHECKED
@given(
    answer=st.text()
    | damaged([answer.encode() for answer in ANSWERS]).map(lambda x: x.decode(errors="replace"))
    | st.lists(pieces).map("".join)
)
def test_any_answer_is_a_verdict_or_none(mode, answer):
    verdict = read(parse, mode, answer)
    assert isinstance(verdict, Verdict) and verdict.value in VERDICTS[mode]
    assert verdict.confidence is None or 0 <= verdict.confidence <= 100
    assert verdict.place is None or 0 <= verdict.place < len(answer)


STARTS = ["", "preferred", "confidence", "grade", "ranking:", '{"preferred": "', "A", "1"]
REPEATED = [" ", "*", "\n", "{", "[", ".", "9", "1, ", "a ", '{"a":', "preferred ", "<think>",
            "confidence score", "A or ", "(0"]  # fmt: skip


@pytest.mark.parametrize("mode", VERDICTS)
@pytest.mark.parametrize("repeated", REPEATED)
def test_an_answer_that_repeats_itself_takes_no_time(mode, repeated):
    """As judges' do that have lost their way, up to their limit."""
    for start in STARTS:
        read(parse, mode, start + repeated * (4000 // len(repeated)))


# --- journals ---

ASKED = {"prompt": "p"}
JOURNAL = [
    {"journal": 1, "asked": ASKED},
    {"key": "1", "judge": "j", "answer": "A"},
    {"key": "2", "answer": None},
]
journal_bytes = (
    st.binary()
    | damaged([b"".join(encoded(row) + b"\n" for row in JOURNAL)])
    | st.lists(st.sampled_from(JOURNAL).flatmap(changed), min_size=1, max_size=4).map(
        lambda rows: b"".join(encoded(row) + b"\n" for row in rows)
    )
)


@CHECKED
@example(content=DEEP + b"\n")
@example(content=b'{"journal": 1, "asked": []}\n{"key": "1"}\n')
@given(content=journal_bytes)
def test_any_journal_is_read_or_refused_by_its_file_and_left_as_it_is(content, tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    journal = read(Journal, path, ASKED)
    if isinstance(journal, InputError):
        assert names(journal, path)
        whole = content[: content.rfind(b"\n") + 1]  # a line that is cut off goes
        assert path.read_bytes() in (content, whole)
    else:
        journal._file.close()
        *lines, _ = content.split(b"\n")
        assert repr(journal.answers) == repr([json.loads(line) for line in lines[1:]])
