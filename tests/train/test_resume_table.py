"""What a run is made of when it is killed, within a step and an epoch: it ends with the bits of one
that was not. Sharded weights and other numbers of ranks: test_engine.py, test_several_ranks.py.

That such a comparison can fail is seen each time: another seed ends with other bits, and is refused
where a run goes on.
"""

import itertools
import os
import signal
import threading

import peft  # noqa: F401 - in the parent of all forks, as all that is imported for its own sake
import pytest
import torch
import torchao  # noqa: F401
from safetensors.torch import load_file

import rankpo_fast.commands.contrastive
import rankpo_fast.commands.rankpo  # noqa: F401
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train import loop
from support.bounded import Outcome, command

SMALL = ("--max_tokens_per_micro_batch", 120, "--activation_memory_gb", 0)  # several passes a batch
BF16 = ("--weights_dtype", "bf16", "--bf16", "true")
LORA = ("--lora_rank", 4, "--lora_dropout", 0.1)
REFERENCE = ("--reference_free", "false")
CASES = {
    "stage-1": ("contrastive",),
    "stage-1-gradient-cache": ("contrastive", *SMALL),
    "stage-1-lora": ("contrastive", *LORA),
    "stage-1-8-bit-states": ("contrastive", *BF16, "--optim", "adamw_8bit"),
    "stage-2": ("rankpo",),
    "stage-2-reference": ("rankpo", *REFERENCE),
    "stage-2-lora": ("rankpo", *REFERENCE, *LORA),
    "stage-2-8-bit-states": ("rankpo", *SMALL, *REFERENCE, *BF16, "--optim", "adamw_8bit"),
}
SAVED, KILLED, STEPS = 4, 6, 7  # of which three are an epoch


def killed_within() -> None:
    """SIGKILL in step KILLED, when its second batch, or micro-batch, is about to be encoded and the
    checkpoint of step SAVED is on the disk (what a kill while it is written leaves: test_kills.py).
    """
    forward, step, steps = Encoder.forward, loop.train_step, itertools.count(1)
    calls: list[int] = []

    def counted_step(*args):
        calls[:] = [next(steps)]
        return step(*args)

    def counted_forward(*args):
        calls.append(0)
        if calls[0] == KILLED and len(calls) == 3:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":  # train/background.py
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*args)

    loop.train_step, Encoder.forward = counted_step, counted_forward


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one_and_of_no_other(
    case, tiny_bert_dir, contrastive_file, preference_file, tmp_path
):
    """With dropout on, two batches a step."""
    stage, *flags = CASES[case]
    files = {"contrastive": contrastive_file, "rankpo": preference_file}

    def run(name: str, *more, **options) -> Outcome:
        return command(
            *(stage, "--model_name_or_path", tiny_bert_dir, "--train_data", files[stage]),
            *("--output_dir", tmp_path / name, "--cache_dir", tmp_path / "cache"),
            *("--device", "cpu", "--bf16", "false", "--per_device_train_batch_size", 4),
            *("--gradient_accumulation_steps", 2, "--learning_rate", 3e-3, "--auto_resume"),
            *("--save_steps", SAVED, "--max_steps", STEPS, "--logging_steps", 1, *flags, *more),
            **options,
        )

    def weights(name: str) -> dict[str, torch.Tensor]:
        tensors = load_file(tmp_path / name / "model.safetensors")
        return {name: tensor.view(torch.uint8) for name, tensor in tensors.items()}

    assert run("straight").code == 0
    assert run("killed", before=killed_within).code == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed/checkpoints").iterdir()] == [
        f"step-{SAVED:08d}"
    ]
    refused = run("killed", "--seed", 43)
    assert refused.code == 2 and "--seed was 42, is 43" in refused.complaint
    resumed = run("killed")
    assert resumed.code == 0 and f"after step {SAVED}" in resumed.said
    assert run("other", "--seed", 43).code == 0
    want, got, other = map(weights, ("straight", "killed", "other"))
    assert want.keys() == got.keys() == other.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not all(torch.equal(want[name], other[name]) for name in want)
