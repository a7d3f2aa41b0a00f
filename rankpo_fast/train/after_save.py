"""--after_save: a command of the user's, once a checkpoint is complete."""

import os
import subprocess
from pathlib import Path

CHECKPOINT, STEP = "RANKPO_CHECKPOINT", "RANKPO_STEP"  # in its environment


def run_after_save(command: str, checkpoint: Path, step: int) -> str | None:
    """Run it in a shell and wait for it, since the checkpoint may go with a later one; what it
    prints goes to stderr. Returns what went wrong."""
    environment = os.environ | {CHECKPOINT: str(checkpoint.absolute()), STEP: str(step)}
    try:
        done = subprocess.run(
            command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=2
        )
    except OSError as error:
        return f"--after_save: the command for step {step} could not be started ({error})"
    if done.returncode == 0:
        return None
    return f"--after_save: the command for step {step} ended with exit status {done.returncode}"
