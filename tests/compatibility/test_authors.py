"""The RankPO authors' command lines run with the program's name changed: each flag has its fate.

The tables hold the flags and values of the scripts of github.com/yflyzhang/RankPO (a579912).
"""

import dataclasses
import json
import warnings

import pytest
import torch

from rankpo_fast.cli import COMMANDS, main
from rankpo_fast.config import EncoderConfig, MineConfig
from rankpo_fast.flags import parse
from rankpo_fast.model.load import load_encoder

OURS = "ours"  # the setting of that name has that value
NONE = "no effect"  # and it is said why; any other text: what it is said to be read as

TRAINING = {
    "attn_implementation": ("flash_attention_2", OURS),
    "output_dir": ("outputs/models/run", OURS),
    "lr_scheduler_type": ("cosine", OURS),
    "warmup_ratio": ("0.1", OURS),
    "bf16": (None, OURS),
    "gradient_checkpointing": (None, OURS),
    "deepspeed": ("configs/ds_zero1_config_llama.json", NONE),
    "num_train_epochs": ("3", OURS),
    "per_device_train_batch_size": ("8", OURS),
    "gradient_accumulation_steps": ("4", OURS),
    "dataloader_drop_last": ("True", NONE),
    "normalize_embeddings": ("True", NONE),
    "max_query_length": ("1280", OURS),
    "max_passage_length": ("4096", OURS),
    "logging_steps": ("1", OURS),
    "learning_rate": ("1e-5", OURS),
    "log_level": ("info", NONE),
    "save_strategy": ("epoch", NONE),
    "save_only_model": (None, NONE),
    "remove_unused_columns": ("False", NONE),
    "wandb_project": ("rankpo", NONE),
    "run_name": ("run-2026-11-29", NONE),
}
SCRIPTS = {
    "contrastive": {
        **TRAINING,
        "model_name_or_path": ("meta-llama/Llama-3.2-1B", OURS),
        "train_data": ("data/train_data.jsonl", OURS),
        "num_negatives": ("5", OURS),
        "use_inbatch_neg": (None, NONE),
        "negatives_cross_device": (None, NONE),
        "temperature": ("0.02", OURS),
    },
    "rankpo": {
        **TRAINING,
        "model_name_or_path": ("outputs/models/xxx", OURS),
        "train_data": ("data/predictions/pairs", OURS),
        "dataset_num_proc": ("8", NONE),
        "reference_free": ("True", OURS),
        "disable_dropout": ("False", OURS),
        "sft_weight": ("0.0", OURS),
        "rankpo_weight": ("1.0", OURS),
        "temperature": ("0.1", OURS),
        "beta": ("2.0", OURS),
    },
    "evaluate": {
        "evaluate_all_checkpoints": ("False", NONE),  # true: test_every_checkpoint_is_evaluated
        "model_name_or_path": ("outputs/models/rankpo-loss/llama", OURS),
        "attn_implementation": ("flash_attention_2", OURS),
        "output_dir": ("results", "--output results/llama/main.json"),
        "bf16": (None, OURS),
        "k": ("100", NONE),
        "batch_size": ("32", NONE),
        "query_data": ("data/raw_test_data.jsonl", OURS),
        "corpus_data": ("data/raw_authors.jsonl", OURS),
        "max_query_length": ("1280", OURS),
        "max_passage_length": ("4096", OURS),
        "device": ("2", "--device cuda:2"),
    },
    "mine": {
        "model_name_or_path": ("outputs/models/m", OURS),
        "input_file": ("data/raw_train_data.jsonl", "--train_data"),
        "output_prefix": ("data/llama-hn1", "--output_file data/llama-hn1/sample.jsonl"),
        "bf16": (None, OURS),
        "batch_size": ("32", NONE),
        "max_query_length": ("1280", OURS),
        "max_passage_length": ("4096", OURS),
        "search_range": ("0-100", OURS),
        "num_negatives": ("10", OURS),
        "num_clusters": ("10", NONE),
        "seed": ("36", OURS),
        "device": ("3", "--device cuda:3"),
    },
}  # fmt: skip


def argv(flags) -> list[str]:
    return [text for name, value in flags.items() for text in (f"--{name}", value) if text]


def read(command, flags):
    """The settings of a command line, {name: value}, and what is said of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = parse(command, "summary", COMMANDS[command].settings, argv(flags))
    values = {k: v for part in settings for k, v in dataclasses.asdict(part).items()}
    return values, [str(warning.message) for warning in said]


def same(value, text) -> bool:
    value = value[0] if isinstance(value, list) else value
    if isinstance(value, bool) or text is None:
        return str(value).lower() == (text or "true").lower()
    return float(text) == value if isinstance(value, (int, float)) else value == text


@pytest.mark.parametrize("command", SCRIPTS)
def test_each_flag_of_a_script_is_ours_or_said_to_be_something_else(command):
    script = SCRIPTS[command]
    values, said = read(command, {name: value for name, (value, _) in script.items()})
    for name, (value, fate) in script.items():
        about = [text for text in said if f"--{name}" in text.split(":")[0].split()]
        if fate == OURS:
            assert same(values[name], value) and not about, name
        elif fate == NONE:
            assert len(about) == 1 and ": " in about[0], name
        else:
            assert len(about) == 1 and about[0].endswith(f"as {fate}"), name


REFUSED = [
    ("contrastive", "use_inbatch_neg", "false", "--rankpo_weight 0"),
    ("contrastive", "normalize_embeddings", "False", "length 1"),
    ("contrastive", "negatives_cross_device", "False", "share"),
    ("contrastive", "dataloader_drop_last", "False", "next epoch"),
    ("contrastive", "fp16", None, "--bf16"),
    ("contrastive", "trust_remote_code", "True", "needs --revision"),
    ("contrastive", "torch_dtype", "bfloat16", "--bf16"),
    ("rankpo", "generate_during_eval", "True", "writes no text"),
    ("evaluate", "k", "50", "--cutoffs"),
    ("evaluate", "index_factory", "IVF100,Flat", "exact"),
    ("evaluate", "save_index", "True", "encode"),
    ("mine", "method", "topk,cluster", "topk, sample or cluster"),
    ("mine", "lambda_", "0.5", "cluster"),
    ("mine", "fp16", "True", "--bf16"),
]


@pytest.mark.parametrize("command, flag, value, instead", REFUSED)
def test_what_we_do_not_do_is_refused_with_what_to_use(command, flag, value, instead, capsys):
    script = {name: value for name, (value, _) in SCRIPTS[command].items()}
    assert main([command, *argv(script | {flag: value})]) == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert message.startswith(f"--{flag}") and instead in message


@pytest.mark.parametrize(
    "setting, value, refused",
    [("optimizer", {"type": "Adam"}, True), ("gradient_clipping", 0.5, True), ("zero", 1, False)],
)
def test_a_deepspeed_file_that_sets_what_flags_set_is_refused(setting, value, refused, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"bf16": {"enabled": "auto"}, setting: value}))
    flags = {name: value for name, (value, _) in SCRIPTS["contrastive"].items()}
    flags["deepspeed"] = str(tmp_path / "ds.json")
    if not refused:
        read("contrastive", flags)
        return
    with pytest.raises(ValueError, match=f"its {setting} would not be read"):
        read("contrastive", flags)


# --- and they run ---

QUERY, POSITIVE, NEGATIVES = "a nurse", "nurse", ["cook", "pilot", "clerk"]


@pytest.fixture
def tiny(tmp_path, tiny_llama_dir):
    """tiny(command, **other values) -> the script's flags, for a tiny model on the CPU."""

    def flags(command, **others):
        script = {name: value for name, (value, _) in SCRIPTS[command].items()}
        script |= {"model_name_or_path": str(tiny_llama_dir), "device": "cpu"} | others
        script |= {"bf16": "false", "cache_dir": str(tmp_path / "cache")}
        script |= {"max_query_length": "64", "max_passage_length": "64"}
        if "attn_implementation" in script:
            script["attn_implementation"] = "sdpa"
        if "learning_rate" in script:
            script |= {"num_train_epochs": "1", "output_dir": str(tmp_path / command)}
        return [command, *argv(script)]

    return flags


def rows(path, *contents) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in contents))
    return str(path)


def test_both_stages_mining_and_evaluation_run_with_the_scripts_flags(tiny, tmp_path, capsys):
    nested = {"query": {"text": QUERY}, "positives": {"text": [POSITIVE], "index": [0]}}
    raw = rows(tmp_path / "raw.jsonl", nested | {"negatives": {"text": NEGATIVES}})
    mined = ["--search_range", "0-3", "--num_negatives", "2"]
    prefix = str(tmp_path / "hn")
    assert main([*tiny("mine", input_file=raw, output_prefix=prefix), *mined]) == 0

    train = f"{prefix}/sample.jsonl"
    assert main(tiny("contrastive", train_data=train)) == 0
    pair = {"query": QUERY, "passage1": POSITIVE, "passage2": "cook", "preferred": "A"}
    pairs = rows(tmp_path / "pairs.jsonl", pair)
    stage_1 = str(tmp_path / "contrastive")
    assert main(tiny("rankpo", train_data=pairs, model_name_or_path=stage_1)) == 0

    corpus = rows(tmp_path / "corpus.jsonl", *({"text": t} for t in [POSITIVE, *NEGATIVES]))
    data = {"query_data": raw, "corpus_data": corpus, "output_dir": str(tmp_path / "results")}
    flags = tiny("evaluate", model_name_or_path=str(tmp_path / "rankpo"), **data)
    assert main([*flags, "--cutoffs", "1,2"]) == 0
    assert json.loads((tmp_path / "results/rankpo/main.json").read_text())["recall@2"] <= 1
    assert "Traceback" not in capsys.readouterr().err


def test_every_checkpoint_is_evaluated(tiny, tmp_path, tiny_llama_dir, capsys):
    models = tmp_path / "models"
    encoder = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))
    encoder.save(models)
    classic = models / "checkpoint-3"  # whose weights lie in a module's folder
    for file in tiny_llama_dir.iterdir():
        (classic / "0_Transformer").mkdir(parents=True, exist_ok=True)
        (classic / "0_Transformer" / file.name).symlink_to(file)
    modules = [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]
    (classic / "modules.json").write_text(json.dumps(modules))
    for step in (1, 2):
        rows(models / f"checkpoints/step-0000000{step}/manifest.json")
    query = {"query": {"text": QUERY}, "positives": {"text": [POSITIVE], "index": [0]}}
    data = {
        "query_data": rows(tmp_path / "raw.jsonl", query),
        "corpus_data": rows(tmp_path / "corpus.jsonl", {"text": POSITIVE}, {"text": "cook"}),
        "model_name_or_path": str(models), "evaluate_all_checkpoints": "True",
    }  # fmt: skip
    assert main(tiny("evaluate", output_dir=str(tmp_path / "results"), **data)) == 0
    assert "2 checkpoints of runs below" in capsys.readouterr().err
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("results/**/*.json")}
    assert written == {"results/models/main.json", "results/models/checkpoint-3.json"}
    one_file = ["--output", str(tmp_path / "x.json")]
    assert main([arg for arg in tiny("evaluate", **data)] + one_file) == 2
    assert "--output is one file for the 2 models" in capsys.readouterr().err
    assert main(tiny("evaluate", **data | {"model_name_or_path": str(tmp_path / "none")})) == 2
    assert "no model in or below" in capsys.readouterr().err


def test_clusters_of_their_mining_are_ours():
    flags = ["--train_data", "rows.jsonl", "--method", "cluster", "--num_clusters", "7"]
    [config] = parse("mine", "mining", [MineConfig], flags)
    assert (config.method, config.clusters) == ("cluster", 7)
