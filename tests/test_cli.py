"""What a user gets wrong is named with file, line or flag: exit code 2, nothing half-written."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rankpo_fast.cli import main
from rankpo_fast.config import PAPER_SPECIAL_TOKENS, ModelConfig, TrainingConfig
from rankpo_fast.flags import parse
from rankpo_fast.train.task import LossOutput

CONTRASTIVE_ROW = {"query": "a nurse", "positives": ["nurse"], "negatives": ["cook", "pilot"]}
PREFERENCE_ROW = {"query": "a nurse", "passage1": "nurse", "passage2": "cook", "preferred": "A"}


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def changed(row, **values) -> bytes:
    """A good row, then the row with other values; None leaves the key out."""
    return lines(row, {k: v for k, v in {**row, **values}.items() if v is not None})


@pytest.fixture
def command(tmp_path, tiny_llama_dir):
    """command("contrastive", data, *flags) -> argv of a short run on data (bytes, or a path)."""

    def make(name, data, *flags):
        path = data
        if isinstance(data, bytes):
            path = tmp_path / "rows.jsonl"
            path.write_bytes(data)
        given = {
            "--model_name_or_path": tiny_llama_dir, "--train_data": path,
            "--output_dir": tmp_path / "out", "--cache_dir": tmp_path / "cache",
            "--max_steps": 2, "--per_device_train_batch_size": 2, "--bf16": "false",
            "--device": "cpu", "--learning_rate": 0.001, "--gradient_accumulation_steps": 1,
        }  # fmt: skip
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        return [name, *(str(part) for pair in given.items() for part in pair)]

    return make


def refused(argv, capsys) -> str:
    """The message of a refusal."""
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err.count("rankpo-fast: error: ") == 1 and "Traceback" not in said.err
    assert "Loading" not in said.err  # no model before the complaint
    return said.err


BAD_DATA = [
    ("contrastive", b'{"query": "a", \n', ["rows.jsonl:1", "JSON"]),
    ("contrastive", lines(CONTRASTIVE_ROW) + b'{"query": "caf\xe9"}\n', ["rows.jsonl:2", "UTF-8"]),
    ("contrastive", changed(CONTRASTIVE_ROW, query=None), ["rows.jsonl:2", "query"]),
    ("contrastive", changed(CONTRASTIVE_ROW, positives=None), ["rows.jsonl:2", "positives"]),
    ("contrastive", changed(CONTRASTIVE_ROW, positives=[]), ["rows.jsonl:2", "positives"]),
    ("contrastive", changed(CONTRASTIVE_ROW, query=3), ["rows.jsonl:2", "query"]),
    ("contrastive", changed(CONTRASTIVE_ROW, negatives=[None]), ["rows.jsonl:2", "negatives"]),
    ("contrastive", changed(CONTRASTIVE_ROW, query="  "), ["rows.jsonl:2", "query"]),
    ("contrastive", b"", ["rows.jsonl", "empty"]),
    ("contrastive", b"[1]\n", ["rows.jsonl:1"]),
    ("rankpo", changed(PREFERENCE_ROW, preferred="C"), ["rows.jsonl:2", "preferred", "C"]),
    ("rankpo", changed(PREFERENCE_ROW, passage1=""), ["rows.jsonl:2", "passage1"]),
    ("rankpo", changed(PREFERENCE_ROW, passage2=None), ["rows.jsonl:2", "passage2"]),
    ("rankpo", lines(CONTRASTIVE_ROW), ["rows.jsonl:1", "passage1"]),
    ("contrastive", "no/such-file.jsonl", ["no/such-file.jsonl"]),
    ("contrastive", "/", ["/"]),
]  # fmt: skip


@pytest.mark.parametrize("name, data, named", BAD_DATA, ids=lambda x: str(x)[:40])
def test_bad_rows_are_named(name, data, named, command, capsys, tmp_path):
    message = refused(command(name, data), capsys)
    assert all(part in message for part in named), message
    assert not (tmp_path / "out").exists()


BAD_FLAGS = [
    ("contrastive", ["--temperature", -1.0], "--temperature must be > 0, got -1.0"),
    ("contrastive", ["--temperature", "nan"], "--temperature must be finite, got nan"),
    ("contrastive", ["--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
    ("contrastive", ["--per_device_train_batch_size", 0], "must be >= 1, got 0"),
    ("contrastive", ["--bf16", "maybe"], "--bf16: auto, true or false, not 'maybe'"),
    ("contrastive", ["--save_minutes", -1], "--save_minutes must be >= 0, got -1.0"),
    ("contrastive", ["--num_negatives", -1], "--num_negatives must be >= 0, got -1"),
    ("contrastive", ["--max_query_length", 0], "--max_query_length must be >= 1, got 0"),
    ("contrastive", ["--warmup_ratio", 1.5], "--warmup_ratio must be in [0, 1), got 1.5"),
    ("contrastive", ["--learning_rate", 0], "--learning_rate must be > 0, got 0.0"),
    ("contrastive", ["--pooling", "max"], "--pooling"),
    ("contrastive", ["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("contrastive", ["--device", "cuda:99"], "--device cuda:99: there are"),
    ("contrastive", ["--lerning_rate", 1], "--lerning_rate (did you mean --learning_rate?)"),
    ("contrastive", ["--beta", 1], "unknown flag --beta"),
    ("contrastive", ["--query_data", "q.jsonl"], "--query_data needs --corpus_data"),
    ("contrastive", ["--preference_data", "none.jsonl"], "none.jsonl"),
    ("contrastive", ["--resume", "no/checkpoint"], "no/checkpoint: not a complete checkpoint"),
    ("contrastive", ["--model_name_or_path", "no-such/dir/here"], "no-such/dir/here"),
    ("contrastive", ["--max_passage_length", 100_000], "--max_passage_length 100000"),
    ("contrastive", ["--seed", 2**63], "--seed must be in [0, 2**63), got 9223372036854775808"),
    ("contrastive", ["--device", "cuda:²"], "--device must be auto, cpu, cuda or cuda:N"),
    ("rankpo", ["--beta", 0], "--beta must be > 0, got 0.0"),
    ("rankpo", ["--label_smoothing", 0.5], "--label_smoothing must be in [0, 0.5), got 0.5"),
    ("rankpo", ["--sft_weight", -1], "--sft_weight must be >= 0, got -1.0"),
    ("rankpo", ["--rankpo_weight", 0], "--sft_weight and --rankpo_weight are both 0"),
    ("rankpo", ["--loss_type", "square"], "--loss_type"),
    ("rankpo", ["--reference_model_name_or_path", "x"], "needs --reference_free false"),
    ("rankpo", ["--use_confidence", "true"], "confidence_score"),
    ("rankpo", ["--replay_weight", 0.5], "--replay_weight needs --replay_data"),
    ("rankpo", ["--replay_batch_size", 4], "--replay_batch_size needs --replay_data"),
    ("rankpo", ["--replay_data", "x", "--replay_weight", 0], "--replay_weight must be > 0, got 0"),
    ("rankpo", ["--replay_data", "none.jsonl"], "none.jsonl"),
    ("rankpo", ["--train_data_weights", "0"], "--train_data_weights must be finite numbers > 0"),
    ("rankpo", ["--replay_data", " "], "--replay_data must be a name, not empty"),
    ("rankpo", ["--graded_data", "none.jsonl"], "none.jsonl"),
    ("rankpo", ["--teacher_data", "x", "--teacher_temperature", 0], "--teacher_temperature must"),
    ("rankpo", ["--graded_form", "lambda"], "--graded_form needs --graded_data"),
    ("contrastive", ["--teacher_data", "x"], "unknown flag --teacher_data"),
    ("contrastive", ["--replay_data", "x"], "unknown flag --replay_data"),
]  # fmt: skip


@pytest.mark.parametrize("name, flags, named", BAD_FLAGS, ids=lambda x: str(x)[:40])
def test_bad_flags_are_named(name, flags, named, command, capsys, tmp_path):
    good = {"contrastive": CONTRASTIVE_ROW, "rankpo": PREFERENCE_ROW}[name]
    assert named in refused(command(name, lines(good), *flags), capsys)
    assert not (tmp_path / "out").exists()


def test_data_is_read_before_the_model(command, capsys):
    message = refused(command("rankpo", b"{}\n", "--model_name_or_path", "no/such/model"), capsys)
    assert "rows.jsonl:1" in message


@pytest.mark.parametrize(
    "argv, named",
    [
        (["contrastve"], "unknown command contrastve (did you mean contrastive?)"),
        (["contrastive"], "required: --model_name_or_path, --train_data, --output_dir"),
        (["evaluate", "--model_name_or_path", "m"], "nothing to measure"),
        (["mine", "x"], "required"),
    ],
)
def test_incomplete_commands_are_explained(argv, named, capsys):
    assert named in refused(argv, capsys)


def test_foreign_output_directory_is_refused(command, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "thesis.tex" in refused(command("contrastive", lines(CONTRASTIVE_ROW)), capsys)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["mine", "--train_data", "r.jsonl", "--output_file", "./r.jsonl"], "is also read"),
        (
            ["mine", "--train_data", "r", "--output_file", "m", "--search_range", "0-²"],
            "FIRST-LAST",
        ),
        (
            ["mine", "--train_data", "r", "--output_file", "m", "--max_score", "1.5"],
            "--max_score must be a cosine",
        ),
        (
            ["mine", "--train_data", "r", "--output_file", "m", "--relative_margin", "-0.1"],
            "--relative_margin must be >= 0",
        ),
        (["encode", "--input", "r.jsonl", "--output", "x.npy"], "x.npy is a directory"),
        (["evaluate", "--preference_data", "r.jsonl", "--output", "r.jsonl"], "is also read"),
        (["evaluate", "--query_data", ".", "--output", "corpus.jsonl"], "is also read"),
        (["evaluate", "--query_data", ".", "--output_run", "corpus.jsonl"], "is also read"),
        (["evaluate", "--query_data", ".", "--output", "x", "--output_run", "./x"], "two names"),
        (["evaluate", "--query_data", ".", "--output", "file", "--output_run", "link"], "two nam"),
        (["evaluate", "--preference_data", "r", "--split", "dev"], "--split needs --query_data"),
        (
            ["evaluate", "--preference_data", "r", "--cache_dir", "file"],
            "--cache_dir file is a file",
        ),
    ],
)
def test_output_that_cannot_be_written_is_refused_at_once(
    argv, named, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npy").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert named in refused([*argv, "--model_name_or_path", "no/such/model"], capsys)


# --- the config file ---


def test_command_line_wins_over_config_file(command, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("max-steps: 1\nlogging_steps: 1\nlearning_rate: 1e-4\nbf16: false\n")
    argv = command("contrastive", lines(CONTRASTIVE_ROW), "--config", settings)
    assert main(argv) == 0
    written = [
        json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [line["step"] for line in written] == [1, 2]
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert record["settings"]["--learning_rate"] == 0.001


@pytest.mark.parametrize(
    "words, value",
    [
        ([], "auto"), (["--bf16"], True), (["--bf16", "auto"], "auto"), (["--bf16=false"], False),
        (["--bf16", "true"], True), (["--no_bf16"], False), (["--no-bf16"], False),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)  # fmt: skip
def test_a_flag_may_be_auto_true_or_false(words, value):
    [model] = parse("contrastive", "train", [ModelConfig], ["--model_name_or_path", "m", *words])
    assert (model.bf16, model.gradient_checkpointing) == (value, "auto")


@pytest.mark.parametrize("word, value", [("auto", "auto"), ("true", True), ("false", False)])
def test_a_config_file_may_say_auto_true_or_false(word, value, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(f"model_name_or_path: m\ngradient_checkpointing: {word}\n")
    [model] = parse("contrastive", "train", [ModelConfig], ["--config", str(path)])
    assert (model.gradient_checkpointing, model.bf16) == (value, "auto")


def test_false_in_a_config_file_unsets(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("output_dir: o\nsave_steps: false\nmax_steps: x\noverwrite_output_dir: false\n")
    flags = ["--config", str(path), "--max-steps", "3"]
    [training] = parse("contrastive", "train", [TrainingConfig], flags)
    assert (training.save_steps, training.max_steps) == (None, 3)
    assert training.overwrite_output_dir is False
    path.write_text(
        "model_name_or_path: no\nuse_liger_kernel: false\npacking: no\nmax_query_length: 010\n"
    )
    [model] = parse("contrastive", "train", [ModelConfig], ["--config", str(path)])
    assert (model.use_liger_kernel, model.packing) == (False, False)
    assert (model.model_name_or_path, model.max_query_length) == ("no", 10)


@pytest.mark.parametrize(
    "content, named",
    [
        ("temprature: 0.1\n", "unknown key temprature (did you mean temperature?)"),
        ("temperature: -2\n", "settings.yaml: --temperature must be > 0, got -2.0"),
        ("temperature: warm\n", "settings.yaml: argument --temperature: invalid float"),
        ("training:\n  max_steps: 3\n", "unknown key training"),
        ("temperature: {a: 1}\n", "not nested"),
        ("- 1\n", "flag: value"),
        ("a: [\n", "line 2"),
        ("learning_rate: 1\nlearning_rate: 2\n", "learning_rate is given twice"),
        ("learning_rate: null\n", "learning_rate cannot be null: give a value, or leave"),
        ("max_grad_norm: false\n", "max_grad_norm cannot be false"),
        ("warmup_ratio: off\n", "--warmup_ratio: invalid float value: 'off'"),
        ("report_to: []\n", "report_to cannot be []: give a value, or leave the key out for none"),
        ("save_minutes: 1:30\n", "--save_minutes: invalid float value: '1:30'"),
        ("config: other.yaml\n", "a file cannot name another one by config"),
        (None, "no-such.yaml"),
    ],
)
def test_bad_config_file_is_explained(content, named, command, capsys, tmp_path):
    path = tmp_path / ("no-such.yaml" if content is None else "settings.yaml")
    if content is not None:
        path.write_text(content)
    argv = command("contrastive", lines(CONTRASTIVE_ROW), "--config", path)
    assert named in refused(argv, capsys)


# --- the commands ---


def test_help_names_every_command_and_flag(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in ("contrastive", "rankpo", "evaluate", "mine", "encode", "demo"):
        assert name in overview
    with pytest.raises(SystemExit) as stop:
        main(["rankpo", "--help"])
    assert stop.value.code == 0
    assert "--gamma_beta_ratio" in capsys.readouterr().out


def test_bench_is_found_by_its_entry_point_or_said_to_be_missing(capsys, monkeypatch):
    started = []
    program = SimpleNamespace(
        module="rankpo_fast.cli", load=lambda: lambda flags: started.append(flags) or 0
    )
    monkeypatch.setattr("rankpo_fast.cli.entry_points", lambda **named: [program])
    assert main(["bench", "--quick"]) == 0 and started == [["--quick"]]
    for there in ([], [SimpleNamespace(module="no_such_package.main")]):
        monkeypatch.setattr("rankpo_fast.cli.entry_points", lambda there=there, **named: there)
        assert "bench is not installed: `pip install" in refused(["bench"], capsys)


def test_dashes_do_as_well_as_underscores(command, capsys, tmp_path):
    argv = command("contrastive", lines(CONTRASTIVE_ROW))
    assert main([arg.replace("_", "-") if arg.startswith("--") else arg for arg in argv]) == 0
    assert (tmp_path / "out/config.json").exists()


def test_special_tokens_of_the_paper_are_added(command, tmp_path):
    assert main(command("rankpo", lines(PREFERENCE_ROW), "--special_tokens", "paper")) == 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [
        len(tokenizer(t, add_special_tokens=False).input_ids) for t in PAPER_SPECIAL_TOKENS
    ] == [1] * 7


@pytest.fixture
def trained(command, tmp_path):
    assert main(command("contrastive", lines(CONTRASTIVE_ROW, CONTRASTIVE_ROW))) == 0
    return tmp_path / "out"


def test_evaluate_prints_a_table_and_writes_json(trained, tmp_path, capsys):
    (tmp_path / "corpus.jsonl").write_bytes(lines({"text": "nurse"}, {"text": "cook"}))
    row = {"query": {"text": "a nurse"}, "positives": {"index": [0]}}
    (tmp_path / "queries.jsonl").write_bytes(lines(row))
    (tmp_path / "pairs.jsonl").write_bytes(lines(PREFERENCE_ROW))
    capsys.readouterr()
    argv = ["evaluate", "--model_name_or_path", trained, "--query_data", tmp_path / "queries.jsonl",
            "--corpus_data", tmp_path / "corpus.jsonl", "--cutoffs", 2, 1, 2,
            "--preference_data", tmp_path / "pairs.jsonl", "--cache_dir", tmp_path / "cache",
            "--output", tmp_path / "figures.json"]  # fmt: skip
    assert main([*map(str, argv)]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["recall@2"] == 1
    assert figures.pop("intervals")["recall@2"] == [1, 1]
    assert figures.pop("similarities").keys() == {"positives", "hardest negatives", "edges"}
    assert figures.pop("calibration")["scale"] == 20
    taken_of = figures.pop("retrieval") | figures.pop("preferences")
    assert taken_of == {"queries": 1, "documents": 2, "empty_documents": 0, "own_documents": 0,
                        "relevant_pairs": 1, "pairs": 1, "ties": 0}  # fmt: skip
    assert figures.keys() == {"alignment"} | {
        f"{m}@{k}" for m in ("ndcg", "mrr", "recall") for k in (1, 2)
    }
    header, ndcg, *_, alignment = capsys.readouterr().out.splitlines()
    assert header.split() == ["@1", "@2"]
    assert ndcg.split() == ["nDCG", f"{figures['ndcg@1']:.4f}", f"{figures['ndcg@2']:.4f}"]
    assert alignment.split() == ["alignment", f"{figures['alignment']:.4f}"]


@pytest.mark.parametrize("role", ["query", "passage"])
def test_encode_gives_what_sentence_transformers_gives(role, trained, tmp_path, capsys):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["a nurse in Lyon", "a cook", "a pilot with very many years of experience"]
    (tmp_path / "rows.jsonl").write_bytes(lines(*({"q": text} for text in texts)))
    argv = ["encode", "--model_name_or_path", trained, "--input", tmp_path / "rows.jsonl",
            "--text_key", "q", "--output", tmp_path / "q.npy", "--as", role,
            "--cache_dir", tmp_path / "cache"]  # fmt: skip
    assert main([*map(str, argv)]) == 0
    vectors = np.load(tmp_path / "q.npy")
    model = sentence_transformers.SentenceTransformer(str(trained), device="cpu")
    expected = model.encode(texts, prompt_name="query" if role == "query" else "document")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_encode_cuts_to_max_length(trained, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(lines({"text": "nurse " * 50}, {"text": "nurse " * 60}))
    argv = ["encode", "--model_name_or_path", trained, "--input", tmp_path / "rows.jsonl",
            "--output", tmp_path / "p.npy", "--max_length", 8, "--cache_dir", tmp_path]  # fmt: skip
    assert main([*map(str, argv)]) == 0
    first, second = np.load(tmp_path / "p.npy")
    assert np.array_equal(first, second)
    assert "2 texts truncated" in capsys.readouterr().out


def test_an_empty_document_keeps_its_row_as_zeros_and_is_counted(trained, tmp_path, capsys):
    documents = [{"_id": i, "title": "", "text": t} for i, t in enumerate(["nurse", " ", "cook"])]
    argv = ["encode", "--model_name_or_path", str(trained), "--output", str(tmp_path / "x.npy"),
            "--cache_dir", str(tmp_path / "cache"), "--input"]  # fmt: skip
    made = []
    for name, rows in (("all", documents), ("full", documents[::2])):
        (tmp_path / name).write_bytes(lines(*rows))
        assert main([*argv, str(tmp_path / name)]) == 0
        made.append(np.load(tmp_path / "x.npy"))
        assert ("1 empty texts have a vector of zeros" in capsys.readouterr().err) == (
            name == "all"
        )
    assert np.array_equal(made[0][::2], made[1]) and not made[0][1].any()


def test_limit_without_room_for_text_is_named_by_its_flag(trained, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_bytes(lines({"text": "nurse"}))
    model = ["--model_name_or_path", str(trained), "--cache_dir", str(tmp_path / "cache")]
    argv = ["encode", "--input", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "p.npy")]
    assert main([*argv, *model, "--max_length", "2"]) == 2
    assert "--max_length: a maximum length of 2 tokens leaves no room" in capsys.readouterr().err
    argv = [
        "mine",
        "--train_data",
        str(tmp_path / "rows.jsonl"),
        "--output_file",
        str(tmp_path / "m"),
    ]
    assert main([*argv, *model, "--max_query_length", "2"]) == 2
    assert (
        "--max_query_length: a maximum length of 2 tokens leaves no room" in capsys.readouterr().err
    )


@pytest.mark.parametrize("combine", [False, True])
def test_mine_writes_rows_that_stage_1_reads(combine, trained, command, tmp_path):
    argv = ["mine", "--model_name_or_path", trained, "--train_data", tmp_path / "rows.jsonl",
            "--output_file", tmp_path / "mined.jsonl", "--method", "topk", "--num_negatives", 1,
            "--combine", combine, "--cache_dir", tmp_path / "cache"]  # fmt: skip
    assert main([*map(str, argv)]) == 0
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert len(mined) == 2
    for row in mined:
        assert row["positives"] == ["nurse"]
        assert set(row["negatives"]) < {"cook", "pilot"} or combine
    flags = ("--output_dir", tmp_path / "again")
    assert main(command("contrastive", tmp_path / "mined.jsonl", *flags)) == 0


def test_a_positive_with_spaces_round_it_is_no_negative_from_a_corpus(trained, tmp_path, capsys):
    texts = ["nurse\n", " cook", "pilot"]
    rows = [{"query": f"a {text}", "positives": [text], "negatives": []} for text in texts]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    (tmp_path / "corpus.jsonl").write_bytes(lines(*({"_id": t, "text": t} for t in texts)))
    argv = ["mine", "--model_name_or_path", trained, "--train_data", tmp_path / "rows.jsonl",
            "--corpus_data", tmp_path / "corpus.jsonl", "--output_file", tmp_path / "mined.jsonl",
            "--num_negatives", 3, "--cache_dir", tmp_path / "cache"]  # fmt: skip
    assert main([*map(str, argv)]) == 0
    for line, text in zip((tmp_path / "mined.jsonl").read_text().splitlines(), texts, strict=True):
        assert sorted(json.loads(line)["negatives"]) == sorted({*texts} - {text})
    said = capsys.readouterr()
    assert "3 are positives of their query" in said.out and "none of the passages" not in said.err


def test_a_run_that_fails_says_so_without_a_traceback(command, capsys, monkeypatch):
    def loss(task, queries, passages, batch):
        return LossOutput(torch.tensor(float("nan")), queries, passages, {})

    monkeypatch.setattr("rankpo_fast.train.contrastive.ContrastiveTask.loss", loss)
    assert main(command("contrastive", lines(CONTRASTIVE_ROW))) == 1
    assert "error: step 1: loss nan" in capsys.readouterr().err
