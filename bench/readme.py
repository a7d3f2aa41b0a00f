"""README's tables of results, from the result files that they name.

`python -m bench.readme` rewrites what stands between two comments of README.md:

    <!-- bench: bench/results/2026-11-24-cpu.json: info_nce; rankpo 8192x2048 | ratio peak_mib -->
    <!-- end -->

Names, with semicolons between, take a case or some of its shapes (by the words that they begin
with), columns are those of bench/tables.py; without names all are taken, without columns all that
have something. Who lacked a card or a package has no row here, but in the file.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rankpo_fast.errors import InputError

from .questions import Result
from .results import Run, read
from .tables import markdown

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(
    r"(?P<start><!-- bench: (?P<file>[^\s:|]+)(: (?P<names>[^|>]+?))?( \| (?P<columns>[^|>]+?))?"
    r" -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
VERSIONS = ("driver", "cuda", "torch", "triton", "sentence-transformers")  # those told of a file


def rewritten(text: str, root: Path) -> str:
    """`text` with every table as the files in `root` have it.

    InputError if a comment cannot be understood, or a file or a name in it is not there.
    """
    if text.count("<!-- bench:") != len(MARKED.findall(text)):
        raise InputError("a comment '<!-- bench: FILE: NAMES | COLUMNS -->' without its end, or "
                         "with something else in it")  # fmt: skip

    def filled(found: re.Match) -> str:
        run = read(root / found["file"])
        names = [name.strip() for name in (found["names"] or "").split(";") if name.strip()]
        results = [r for name in names for r in named(name, run, found["file"])] or run.results
        table = markdown(list(map(_of_those_here, results)), (found["columns"] or "").split())
        return f"{found['start']}{table}\n{source(run, found['file'])}\n{found['end']}"

    return MARKED.sub(filled, text)


def named(name: str, run: Run, file: str) -> Sequence[Result]:
    found = [result for result in run.results if result.case == name]
    found = found or [r for r in run.results if f"{r.name} ".startswith(f"{name} ")]
    if not found:
        has = ", ".join(dict.fromkeys(result.case for result in run.results))
        raise InputError(f"{file}: no case or shape {name!r}: it has {has}")
    return found


def _of_those_here(result: Result) -> Result:
    return dataclasses.replace(result, rows=tuple(row for row in result.rows if not row.absent))


def source(run: Run, file: str) -> str:
    """Card, versions and commit of a file, in a line."""
    about = {key: str(run.machine.get(key, "unknown")) for key in ("device", "commit", "date")}
    versions = (f"{key} {run.machine[key]}" for key in VERSIONS if key in run.machine)
    return (
        f"From `{file}`: {about['device']}; {', '.join(versions)}; commit {about['commit']}, "
        f"{about['date'][:10]}."
    )


def main() -> int:
    text = README.read_text(encoding="utf-8")
    try:
        new = rewritten(text, README.parent)
    except InputError as error:
        print(f"{README}: {error}", file=sys.stderr)
        return 2
    README.write_text(new, encoding="utf-8")
    print(f"{README}: {'as it was' if new == text else 'rewritten'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
