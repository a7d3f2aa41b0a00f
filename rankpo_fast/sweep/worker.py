"""Parts of a sweep, in a process of their own: `python -m rankpo_fast.sweep.worker JOB.json ...`.

    {"command", "flags", "output_dir"}             train, or go on, unless it is finished
    {"start", "alphas", "evaluation", "figures"}   measure: a JSON file of figures for each alpha

Alpha is the share of the change of weights that is taken, 0 the start itself.
"""

import importlib
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rankpo_fast.config import STAGES
from rankpo_fast.data.files import whole_file
from rankpo_fast.errors import InputError, TrainingStopped, without_secrets
from rankpo_fast.flags import parse
from rankpo_fast.sweep.spec import MEASURED


def train(job: dict[str, Any]) -> None:
    flags = [*job["flags"], f"--output_dir={job['output_dir']}"]
    if (Path(job["output_dir"]) / "training.json").exists():
        flags.append("--resume")
    command = job["command"]
    settings = parse(command, "a training", STAGES[command], flags)
    importlib.import_module(f"rankpo_fast.commands.{command}").run(*settings)


def measure(job: dict[str, Any]) -> None:
    from rankpo_fast.functions import measured
    from rankpo_fast.model.load import load_encoder
    from rankpo_fast.retrieval.evaluate import read_evaluation_data

    data = None
    for alpha in job["alphas"]:
        with _weights(job, alpha) as model:
            flags = [f"--model_name_or_path={model}", *job["evaluation"]]
            encoder, evaluation, compute = parse("evaluate", "an evaluation", MEASURED, flags)
            data = data or read_evaluation_data(evaluation)
            device = compute.torch_device()
            load = partial(load_encoder, encoder, device=device)
            found = measured(load, data, evaluation, compute)
        with whole_file(job["figures"].replace("{alpha}", format(alpha, "g"))) as temporary:
            temporary.write_text(json.dumps(found.figures, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _weights(job: dict[str, Any], alpha: float) -> Iterator[str]:
    """Where the model is; a merged one is gone afterwards."""
    if alpha in (0, 1):
        yield job["output_dir"] if alpha else job["start"]
        return
    from rankpo_fast.config import MergeConfig
    from rankpo_fast.model.merge import merge

    with tempfile.TemporaryDirectory(dir=job["output_dir"], prefix=".merged-") as folder:
        [merged] = merge(MergeConfig(
            [job["output_dir"]], str(Path(folder) / "model"), base_model_name_or_path=job["start"],
            alpha=[repr(alpha)],
        ))  # fmt: skip
        yield str(merged)


def main(paths: Sequence[str]) -> int:
    """One after the other; one that fails ends no other."""
    code = 0
    for path in paths:
        job = json.loads(Path(path).read_text(encoding="utf-8"))
        try:
            if "flags" in job:
                train(job)
            measure(job)
        except TrainingStopped as stop:
            return stop.exit_code
        except (InputError, OSError, FloatingPointError) as error:
            print(f"rankpo-fast: error: {without_secrets(str(error))}", file=sys.stderr, flush=True)
            code = 1
        except Exception:  # of this part, as out of memory may be
            print(without_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
