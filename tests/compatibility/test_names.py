"""The usual names of flags and commands are read as ours, or answered with ours; YAML as well."""

import ast
import dataclasses
import re
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from rankpo_fast.cli import COMMANDS, main
from rankpo_fast.compatibility import fates, names, rules
from rankpo_fast.errors import InputError
from rankpo_fast.flags import parse

FLAGS = {
    name: {field.name for part in command.settings for field in dataclasses.fields(part)}
    for name, command in COMMANDS.items()
}
ALL = set().union(*FLAGS.values())
TRAIN = {"model_name_or_path": "m", "train_data": "d", "output_dir": "o"}


def read(command, *flags):
    """{setting: value} of a command line, and what is said of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = parse(command, "summary", COMMANDS[command].settings, [*map(str, flags)])
    values = {k: v for part in settings for k, v in dataclasses.asdict(part).items()}
    return values, [str(warning.message) for warning in said]


def training(*flags, command="contrastive"):
    return read(command, *(f"--{name}={value}" for name, value in TRAIN.items()), *flags)


READ = [
    ("--lr 1e-4", "learning_rate", 1e-4),
    ("-lr 1e-4", "learning_rate", 1e-4),
    ("--bs=16", "per_device_train_batch_size", 16),
    ("--batch-size 16", "per_device_train_batch_size", 16),
    ("--epochs 2", "num_train_epochs", 2.0),
    ("--grad_accum 3", "gradient_accumulation_steps", 3),
    ("--wd 0.1", "weight_decay", 0.1),
    ("--temp 0.1", "temperature", 0.1),
    ("--scale 20", "temperature", 0.05),
    ("--negatives 2", "num_negatives", 2),
    ("--train_group_size 8", "num_negatives", 7),
    ("--tokenizer t", "tokenizer_name", "t"),
    ("--query_max_len 32", "max_query_length", 32),
    ("--warmup 0.2", "warmup_ratio", 0.2),
    ("--warmup_steps 0", "warmup_ratio", 0.0),
    ("--warmup_steps 0 --warmup_ratio 0.2", "warmup_ratio", 0.2),
    ("--max_steps -1", "max_steps", None),
    ("--resume_from_checkpoint True", "resume", "newest"),
    ("--no-cuda", "device", "cpu"),
    ("--sentence_pooling_method last_token", "pooling", "last"),
    ("--pooling CLS", "pooling", "cls"),
    ("--pooling Mean", "pooling", "mean"),
    ("--append_eos_token true", "append_eos", True),
    ("--lr_scheduler_type constant_with_warmup", "lr_scheduler_type", "constant"),
    ("--dropout 0", "disable_dropout", True),
    ("--save_strategy steps", "save_steps", 500),
    ("--query_prefix=-x", "query_prefix", "-x"),
]


@pytest.mark.parametrize("flags, setting, value", READ)
def test_other_names_and_values_are_read_as_ours_and_said(flags, setting, value):
    values, said = training(*flags.split())
    assert values[setting] == value
    name = flags.split()[0].split("=")[0]
    assert said == [] if name == "--query_prefix" else f"{name} " in said[0].replace(":", " ")


@pytest.mark.parametrize(
    "command, flag",
    [
        ("contrastive", "--cache_path c"),
        ("contrastive", "--pad_to_multiple_of 8"),
        ("contrastive", "--knowledge_distillation False"),
        ("contrastive", "--kd_loss_type m3_kd_loss"),
        ("contrastive", "--query_instruction_format {}{}"),
        ("contrastive", "--same_dataset_within_batch True"),
        ("contrastive", "--normalize"),
        ("contrastive", "--use_lora False"),
        ("contrastive", "--dataset_name json"),
        ("contrastive", "--label_smoothing_factor 0.0"),
        ("mine", "--use_gpu_for_searching"),
    ],
)
def test_flags_of_other_trainers_that_change_nothing_are_said_to(command, flag):
    given = TRAIN if command == "contrastive" else {
        "model_name_or_path": "m", "train_data": "d", "output_file": "o"
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in given.items()]
    _, [said] = read(command, *arguments, *flag.split(maxsplit=1))
    assert said.startswith(flag) and ("not needed" in said or "off here" in said)


def test_batches_of_one_file_each_are_refused_for_several():
    flags = ["--model_name_or_path=m", "--train_data", "a", "b", "--output_dir=o"]
    with pytest.raises(InputError, match="rows of all files share batches"):
        read("contrastive", *flags, "--same_dataset_within_batch", "True")


def test_aliases_are_said_in_one_line():
    _, said = training("--lr", 1, "--bs", 2)
    assert said == ["read --lr as --learning_rate, --bs as --per_device_train_batch_size"]


def test_warmup_steps_are_exactly_those_of_the_schedule():
    import math

    for steps, total in [(7, 100), (1, 3), (29, 290), (49, 1000)]:
        values, _ = training("--warmup_steps", steps, "--max_steps", total)
        assert math.ceil(total * values["warmup_ratio"]) == steps


ANSWERED = [
    ("contrastive", "--max_length 9", "use --max_query_length and --max_passage_length"),
    ("contrastive", "--lr 1 --learning_rate 2", "--lr and --learning_rate are one setting"),
    ("contrastive", "--lr 1 --max-lr 2", "--lr and --max-lr are one setting"),
    ("contrastive", "--no_packing --packing true", "--no_packing and --packing are one setting"),
    ("contrastive", "--dropout 0 --disable_dropout", "--disable_dropout and --dropout are one"),
    ("contrastive", "--train_data e", "--train_data is given twice"),
    ("contrastive", "--eval_data e", "use --query_data (with --corpus_data)"),
    ("contrastive", "--mini_batch_size 4", "use --max_tokens_per_micro_batch"),
    ("contrastive", "--fp16", "--fp16: not taken: --bf16"),
    ("contrastive", "--optim sgd", "--optim: invalid choice: 'sgd'"),
    ("contrastive", "--warmup_steps 100", "--warmup_ratio"),
    ("contrastive", "--save_steps 0.5", "--save_steps 0.5: must be a number of steps"),
    ("contrastive", "--eval_strategy epoch", "--eval_steps"),
    ("contrastive", "--train_group_size x", "--num_negatives"),
    ("contrastive", "--dropout 0.2", "--disable_dropout"),
    ("rankpo", "--label_smoothing_factor 0.1", "share of wrong preferences in rankpo"),
    ("contrastive", "--label_smoothing_factor 0.1", "smooths labels of classes"),
    ("contrastive", "--knowledge_distillation True", "scores of a teacher are learned by rankpo"),
    ("contrastive", "--normalize False", "vectors always have length 1"),
    ("contrastive", "--lora --lora_target_modules q_proj", "give --lora_rank"),
    ("contrastive", "--use_lora False --lora_r 8", "contradicts --lora_rank"),
    ("contrastive", "--dataset_name other/data", "--dataset_name are one setting"),
    (
        "contrastive",
        "--query_instruction A --query_instruction_format=<{}>{}",
        "give the whole of it, --query_prefix '<A>'",
    ),
    ("contrastive", "--query_instruction A --query_instruction_format={}{}!", "nothing behind"),
    ("rankpo", "--gamma 1", "use --gamma_beta_ratio"),
    ("rankpo", "--train_group_size 8", "unknown flag --train_group_size"),
    ("contrastive", "--gamma 1", "unknown flag --gamma"),
    ("contrastive", "--lernig_rate 1", "did you mean --learning_rate?"),
]


@pytest.mark.parametrize("command, flags, answer", ANSWERED)
def test_what_could_be_several_or_none_is_answered_with_ours(command, flags, answer):
    with pytest.raises(InputError, match=re.escape(answer)):
        training(*flags.split(), command=command)


def test_a_config_file_is_read_by_the_same_names(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "model: m\ndata: [d, e]\nout: o\nlr: 1e-4\nbatch-size: 4\ndeepspeed: null\n"
        "use_inbatch_neg: true\ngradient_checkpointing_kwargs: {use_reentrant: false}\nwd: 0.5\n"
    )
    values, said = read("contrastive", "--config", path, "--weight_decay", 0.25)
    assert values["train_data"] == ["d", "e"] and values["learning_rate"] == 1e-4
    assert values["per_device_train_batch_size"] == 4
    assert values["weight_decay"] == 0.25  # the command line's
    assert all(text.startswith(f"--config {path}: ") for text in said)
    assert "read model as model_name_or_path, data as train_data" in said[0]
    path.write_text("lr: 1\nlearning_rate: 2\n")
    with pytest.raises(InputError, match="settings.yaml: lr and learning_rate are one setting"):
        read("contrastive", "--config", path)
    path.write_text("use_inbatch_neg: false\n")
    with pytest.raises(InputError, match="settings.yaml: use_inbatch_neg False: not taken"):
        training("--config", path)


@pytest.mark.parametrize("word, ours", [("eval", "evaluate"), ("hn-mine", "mine")])
def test_other_names_of_commands_are_read(word, ours, capsys):
    assert main([word]) == 2
    said = capsys.readouterr().err
    assert f"read {word} as {ours}" in said and "required: --model_name_or_path" in said


@pytest.mark.parametrize(
    "word, answer",
    [("train", "contrastive"), ("finetune", "rankpo"), ("sft", "--sft_weight 1"), ("x", "encode")],
)
def test_commands_that_could_be_several_or_none_are_answered_with_ours(word, answer, capsys):
    assert main([word]) == 2
    assert answer in capsys.readouterr().err


# --- the tables ---

PENDING = {"project", "run_name"}  # of another change


def test_whatever_the_tables_name_is_a_flag():
    assert names.ALIASES.keys() <= ALL | PENDING
    assert fates.VALUES.keys() <= ALL | PENDING
    source = "".join(Path(module.__file__).read_text() for module in (names, fates, rules))
    named = set(re.findall(r"--([a-z_0-9]+)", source))
    assert named <= ALL | PENDING | {""}


def test_no_name_has_two_fates():
    aliases = [name for others in names.ALIASES.values() for name in set(others.split())]
    hints = [name for others in names.HINTS for name in others.split()]
    assert len(hints) == len(set(hints)) and not set(hints) & (set(aliases) | fates.RULES.keys())
    for command, flags in FLAGS.items():
        read = [name for name in set(aliases) if name in flags]
        meant = {name: names.alias(name, flags) for name in read}
        assert len(meant) == len(read), command


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.25"), reason="looked through up to 5.24"
)
def test_every_flag_of_transformers_training_arguments_has_a_fate():
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    known = fates.RULES.keys() | names._OURS.keys() | FLAGS["contrastive"]
    assert fields <= known | PENDING


TRAINERS = {
    "FlagEmbedding/abc/finetune/embedder/AbsArguments.py": "flagembedding",
    "FlagEmbedding/finetune/embedder/decoder_only/base/arguments.py": "flagembedding",
    "tevatron/arguments.py": "tevatron",
}


@pytest.mark.parametrize("file", TRAINERS)
def test_every_flag_of_other_embedding_trainers_has_a_fate(file):
    """Read from their source: importing it would import all they need."""
    try:
        path = distribution(TRAINERS[file]).locate_file(file)
    except PackageNotFoundError:
        pytest.skip(f"{TRAINERS[file]} is not installed")
    fields = {
        node.target.id
        for cls in ast.parse(path.read_text()).body if isinstance(cls, ast.ClassDef)
        for node in cls.body if isinstance(node, ast.AnnAssign)
    }  # fmt: skip
    hints = {name for others in names.HINTS for name in others.split()}
    assert fields and fields - fates.RULES.keys() - names._OURS.keys() - ALL - hints == set()


def test_optimizers_and_adapters_of_other_trainers_are_ours():
    values, _ = training(
        "--optimizer", "adamw_torch_8bit", "--lora", "true", "--lora_r", 8,
        "--lora_target_modules", "q_proj,v_proj",
    )  # fmt: skip
    assert (values["optim"], values["lora_rank"]) == ("adamw_8bit", 8)
    assert values["lora_targets"] == ["q_proj", "v_proj"]
