"""`rankpo-fast sweep`: many trainings from one file, chosen on validation, tested once."""

import json
from pathlib import Path

from rankpo_fast.config import SweepConfig
from rankpo_fast.data.files import whole_file
from rankpo_fast.extras import require_extra
from rankpo_fast.paths import check_writable
from rankpo_fast.sweep.figure import png
from rankpo_fast.sweep.report import Results, as_json, as_markdown
from rankpo_fast.sweep.run import Runner
from rankpo_fast.sweep.spec import read_sweep
from rankpo_fast.train.lock import held

FIGURE = "frontier.png"


def run(config: SweepConfig) -> None:
    """InputError for a file that cannot be used, before anything is trained; OSError at the end,
    where trainings failed: the report is of the others."""
    require_extra("sweep", "plots")
    path = Path(config.output_dir)
    sweep = read_sweep(Path(config.sweep))
    check_writable("--output_dir", path, directory=True)
    with held(path, "--output_dir"):
        runner = Runner(sweep, path, config.parallel, say=lambda line: print(line, flush=True))
        failed = runner.train()
        results = Results(runner)
        if not any(results.choices(method) for method in results.methods):
            raise OSError(f"no training ended well: see {path / 'runs'}")
        if sweep.test is not None:
            failed += runner.test(results.chosen())
        _write(path, results)
    if failed:
        raise OSError(f"{len(failed)} parts failed, among them {failed[0]}: see {path / 'runs'}; "
                      f"the same command tries them again")  # fmt: skip


def _write(path: Path, results: Results) -> None:
    with whole_file(path / "results.json") as file:
        file.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")
    if results.axes is not None:
        with whole_file(path / FIGURE) as file:
            file.write_bytes(png(results))
    report = as_markdown(results, figure=FIGURE if results.axes is not None else None)
    with whole_file(path / "report.md") as file:
        file.write_text(report, encoding="utf-8")
    print(f"{report}\nin {path}")
