"""The prompt of a mode, a text file that users may edit: {query} and the passages are put in."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rankpo_fast.config.judge import Mode
from rankpo_fast.errors import InputError
from rankpo_fast.paths import reason

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
NEEDED = {
    "pair": ("query", "passage_a", "passage_b"),
    "grade": ("query", "passage"),
    "list": ("query", "passages"),
}
OPTIONAL = {"pair": (), "grade": (), "list": ("count",)}


@dataclass(frozen=True)
class Prompt:
    """A template, checked."""

    mode: Mode
    text: str

    @property
    def digest(self) -> str:
        """By which a journal knows it."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def filled(self, query: str, passages: Sequence[str]) -> str:
        """With the texts in it, in the order in which they are shown; what stands in braces in
        them stays as it is."""
        values = {"query": query, "count": str(len(passages))}
        if self.mode == "pair":
            values["passage_a"], values["passage_b"] = passages
        elif self.mode == "grade":
            [values["passage"]] = passages
        else:
            tagged = (
                f"<candidate_{i}>\n{text}\n</candidate_{i}>" for i, text in enumerate(passages, 1)
            )
            values["passages"] = "\n\n".join(tagged)
        return PLACEHOLDER.sub(lambda found: values[found[1]], self.text)


def default_prompt(mode: Mode) -> str:
    return resources.files("rankpo_fast.judge").joinpath(f"prompts/{mode}.txt").read_text("utf-8")


def read_text(flag: str, path: str) -> str:
    """InputError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: {reason(error)}") from None


def read_prompt(mode: Mode, path: str | None) -> Prompt:
    """The default, or the one in a file; InputError names the line of what cannot be filled in."""
    if path is None:
        return Prompt(mode, default_prompt(mode))
    text = read_text("--prompt", path)
    known = (*NEEDED[mode], *OPTIONAL[mode])
    there_are = ", ".join(f"{{{name}}}" for name in known)
    for number, line in enumerate(text.splitlines(), 1):
        for name in PLACEHOLDER.findall(line):
            if name not in known:
                raise InputError(f"{path}:{number}: {{{name}}} is unknown: there are {there_are} "
                                 f"in --mode {mode}")  # fmt: skip
    for name in NEEDED[mode]:
        if f"{{{name}}}" not in text:
            raise InputError(f"--prompt {path}: {{{name}}} is missing: --mode {mode} needs it")
    return Prompt(mode, text)
