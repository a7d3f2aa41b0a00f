"""What a rented GPU was asked and what it answered: one result file of the bench, whose machine
says how each step went, too. It is rewritten, whole, after every part.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankpo_fast.data.files import whole_file

from .. import results
from ..questions import Result

DONE, RED, CUT_OFF, NOT_REACHED = "done", "red", "cut off", "not reached"
STEPS = "steps"
PART = "part"  # of what a result says about itself: "speed: 16384x16384x1024"


@dataclass(frozen=True)
class Found:
    """What a part answers: tables, facts of the machine, and why it is red."""

    results: Sequence[Result] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""  # in a line
    red: str = ""
    cut: bool = False  # by its own clock: it is to run again

    @property
    def reason(self) -> str:
        """Why it is red; empty if it is not."""
        rows = [
            f"{result.name}: {row.implementation}: {row.note}"
            for result in self.results for row in result.rows if row.red
        ]  # fmt: skip
        return self.red or "; ".join(rows)


@dataclass
class Record:
    """Of one call and those before it, which it goes on from.

    steps: {step: {"state", "parts": {part: {"state", "seconds", "commit", "says"}}}}
    """

    path: Path
    machine: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    steps: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def resumed(path: Path, source: Path | None) -> "Record":
        """From `source`, to be written to `path`; without one from `path`, if it is there."""
        source = source or path
        if not source.exists():
            return Record(path)
        run = results.read(source)
        steps = json.loads(source.read_text()).get(STEPS, {})
        return Record(path, dict(run.machine), list(run.results), steps)

    def forget(self, step: str) -> None:
        """So that it runs again; its results stand until then."""
        self.steps.pop(step, None)

    def expect(self, step: str) -> dict[str, Any]:
        """So that the file names it though it is not reached."""
        return self.steps.setdefault(step, {"state": NOT_REACHED, "parts": {}})

    def declare(self, step: str, parts: Sequence[str]) -> None:
        """Of a step that is reached: its parts."""
        known = self.expect(step)
        for name in parts:
            known["parts"].setdefault(name, {"state": NOT_REACHED})
        known["state"] = _state([part["state"] for part in known["parts"].values()])

    def left(self, step: str, parts: Sequence[str], commit: str) -> list[str]:
        """What is still to be run: what was not reached or cut off, and what another commit left
        red."""

        def is_left(part: Mapping) -> bool:
            if part["state"] == RED:
                return part.get("commit") != commit
            return part["state"] != DONE

        known = self.steps[step]["parts"]
        return [name for name in parts if is_left(known[name])]

    def add(self, step: str, part: str, found: Found, seconds: float, commit: str) -> None:
        reached = CUT_OFF if found.cut else DONE
        state = {"state": RED if found.reason else reached, "seconds": round(seconds, 2)}
        state["commit"] = commit
        if words := found.reason or found.says:
            state["says"] = words[:400]
        self._set(step, part, state)
        self.machine.update(found.facts)
        name = f"{step}: {part}"
        self.results = [r for r in self.results if r.about.get(PART) != name]
        for result in found.results:
            about = {**result.about, PART: name}
            self.results.append(dataclasses.replace(result, about=about))

    def cut_off(self, step: str, part: str) -> None:
        self._set(step, part, {"state": CUT_OFF})

    def _set(self, step: str, part: str, state: dict[str, Any]) -> None:
        parts = self.steps[step]["parts"]
        parts[part] = state
        self.steps[step]["state"] = _state([each["state"] for each in parts.values()])

    @property
    def red(self) -> list[str]:
        return [
            f"{step}: {name}: {part.get('says', '')}"
            for step, known in self.steps.items()
            for name, part in known["parts"].items() if part["state"] == RED
        ]  # fmt: skip

    @property
    def unfinished(self) -> list[str]:
        states = {step: known["state"] for step, known in self.steps.items()}
        return [step for step, state in states.items() if state in (CUT_OFF, NOT_REACHED)]

    def write(self) -> None:
        """A result file as all are, with one more key before the others: what a reader of tables
        has no use for."""
        self.machine["steps"] = ", ".join(f"{name} {x['state']}" for name, x in self.steps.items())
        self.machine["red"] = "; ".join(self.red)
        told = {key: words for key, words in self.machine.items() if words != ""}
        with whole_file(self.path) as temporary:
            results.write(temporary, results.Run(told, self.results))
            text = temporary.read_text()
            temporary.write_text(text.replace("{", f'{{"{STEPS}": {json.dumps(self.steps)},\n', 1))


def _state(parts: Sequence[str]) -> str:
    """Of a step, from its parts."""
    if parts and set(parts) == {NOT_REACHED}:
        return NOT_REACHED
    if {NOT_REACHED, CUT_OFF} & set(parts):
        return CUT_OFF
    return RED if RED in parts else DONE
