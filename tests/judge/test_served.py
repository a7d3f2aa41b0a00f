"""`annotate` against the server of transformers, with a model that has one answer to everything."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from rankpo_fast.cli import main
from support.judge_server import write_pairs

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def parrot(tmp_path_factory, tiny_tokenizer):
    """A causal model whose next token follows from the last alone: after ":" comes "A", then the
    end. Its layers add nothing, so that the hidden state is the token's own unit vector."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory, size = tmp_path_factory.mktemp("parrot"), len(tiny_tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192,
        pad_token_id=tiny_tokenizer.pad_token_id, bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = {text: tiny_tokenizer.convert_tokens_to_ids(text) for text in (":", "A", "</s>")}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids["A"], ids[":"]] = 1
        model.lm_head.weight[ids["</s>"], ids["A"]] = 1
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    limits = {"chat_template": template, "model_max_length": 8192}
    path.write_text(json.dumps(json.loads(path.read_text()) | limits))
    return directory


@pytest.fixture(scope="module")
def served(parrot):
    """The address of a server that has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(parrot),
               "--port", str(port), "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < until
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def test_a_judge_that_always_says_a_is_found_out(served, parrot, tmp_path, capsys):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    argv = ["annotate", "--base_url", served, "--pairs", tmp_path / "pairs.jsonl",
            "--output", tmp_path / "prefs.jsonl", "--max_answer_tokens", 8]  # fmt: skip
    argv = [*map(str, argv)]
    assert main([*argv, "--model", "another"]) == 2
    assert f"has {parrot}" in capsys.readouterr().err
    assert main([*argv, "--model", str(parrot)]) == 0
    assert (tmp_path / "prefs.jsonl").read_text() == ""
    figures = json.loads((tmp_path / "prefs.jsonl.report.json").read_text())
    judge = figures["judges"][str(parrot)]
    assert judge["first_shown_preferred"]["share"] == judge["flipped"]["share"] == 1
    assert judge["tokens"]["in"] > 1000 and judge["tokens"]["out"] >= 6
    assert main([*argv, "--model", str(parrot), "--orders", "one"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "prefs.jsonl").read_text().splitlines()]
    assert [row["preferred"] for row in rows] == ["A"] * 3
