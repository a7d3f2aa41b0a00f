"""--trim_vocabulary in whole runs: the same training, of a smaller embedding."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from rankpo_fast import ContrastiveTrainer, Encoder
from rankpo_fast.config import EncoderConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.load import load_encoder

CPU = torch.device("cpu")
EMBEDDING = "embed_tokens.weight"
PREFIXES = {"query_prefix": "nurse: ", "passage_prefix": "patients "}  # cut another way than alone


def tokens(directory) -> dict[str, int]:
    return Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def asked(path, query):
    return written(path, [{"query": {"text": query}, "positives": {"index": [0]}}])


@pytest.fixture
def evaluated(preference_file, tmp_path):
    """Flags of an evaluation, of which one text alone has the token `mathematics`."""
    corpus = written(tmp_path / "corpus.jsonl", [{"text": "a teacher"}, {"text": "a baker"}])
    more = {"query_data": asked(tmp_path / "queries.jsonl", "mathematics"), "corpus_data": corpus}
    return {"preference_data": [preference_file], "cutoffs": [1], **more}


@pytest.mark.parametrize(
    "stage, flags",
    [
        pytest.param("contrastive", PREFIXES | {"max_query_length": 9}, id="contrastive"),
        pytest.param("rankpo", {"reference_free": False}, id="rankpo-with-reference"),
        pytest.param("rankpo", {"replayed": True, "max_passage_length": 12}, id="replay"),
    ],
)
def test_losses_and_weights_are_those_of_the_whole_vocabulary(
    stage, flags, evaluated, tiny_llama_dir, contrastive_file, run_stage, read_metrics, capsys
):
    flags = {**flags, **evaluated}
    if flags.pop("replayed", False):
        flags |= {"replay_data": [contrastive_file], "replay_batch_size": 4}
    whole = run_stage(stage, tiny_llama_dir, "whole", **flags)
    capsys.readouterr()
    trimmed = run_stage(stage, tiny_llama_dir, "trimmed", trim_vocabulary=True, **flags)
    said = re.search(r"vocabulary +(\d+) of 320 tokens are kept, the model has ([\d,]+) parameters "
                     r"less", capsys.readouterr().err)  # fmt: skip
    want, got = (load_file(path / "model.safetensors") for path in (whole, trimmed))
    vocabulary, own = tokens(whole), tokens(trimmed)
    assert int(said[1]) == len(own) < len(vocabulary)
    assert int(said[2].replace(",", "")) == (320 - len(own)) * 32
    rows = [vocabulary[token] for token in sorted(own, key=own.__getitem__)]
    want[EMBEDDING] = want[EMBEDDING][rows]
    assert want.keys() == got.keys()
    for name in want:  # the norm that gradients are clipped to is summed over fewer rows
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    lines = [read_metrics(path) for path in (whole, trimmed)]
    for before, now in zip(*lines, strict=True):
        for name in before.keys() & {"loss", "eval/ndcg@1", "eval/alignment"}:
            assert now[name] == pytest.approx(before[name], rel=1e-5), name
    assert lines[0][0]["loss"] == lines[1][0]["loss"]  # of the first step, in bits


def test_tokens_of_the_evaluation_alone_and_added_ones_are_kept(
    evaluated, tiny_llama_dir, run_stage
):
    flags = {"trim_vocabulary": True, "max_steps": 1, "special_tokens": ["<own>"]}
    with_it = run_stage("contrastive", tiny_llama_dir, "with", **flags, **evaluated)
    without = run_stage("contrastive", tiny_llama_dir, "without", **flags)
    assert len(tokens(without)) < len(tokens(with_it))
    assert "<own>" in tokens(without)
    of_both = []
    for directory in (with_it, tiny_llama_dir):
        encoder = load_encoder(EncoderConfig(str(directory), pooling="last"), device=CPU)
        ids = encoder.tokenize_queries(["mathematics"]).ids.tolist()
        of_both.append(encoder.tokenizer.convert_ids_to_tokens(ids))
    assert of_both[0] == of_both[1]


def test_a_run_goes_on_with_the_same_tokens_or_not_at_all(
    evaluated, tiny_llama_dir, goes_on_bit_by_bit, tmp_path
):
    other = asked(tmp_path / "other.jsonl", "nurse")
    refused = [({"query_data": other}, "evaluation's texts, whose tokens --trim_vocabulary")]
    straight, stopped = goes_on_bit_by_bit(
        "contrastive", tiny_llama_dir, stop=4, refused=refused, trim_vocabulary=True, figures=(),
        **evaluated,
    )  # fmt: skip
    assert tokens(straight) == tokens(stopped)


def test_an_adapter_or_an_encoder_is_refused(tiny_llama_dir, run_stage, tmp_path):
    with pytest.raises(InputError, match="--trim_vocabulary: an adapter"):
        run_stage("rankpo", tiny_llama_dir, "out", trim_vocabulary=True, lora_rank=4)
    encoder = Encoder.from_pretrained(tiny_llama_dir, device="cpu", pooling="last")
    rows = [{"query": "a", "positives": ["b"], "negatives": ["c"]}]
    with pytest.raises(InputError, match="trim_vocabulary needs the model by its name"):
        ContrastiveTrainer(encoder, rows, output_dir=str(tmp_path / "out"), trim_vocabulary=True)
