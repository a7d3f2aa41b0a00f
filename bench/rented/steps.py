"""What is asked of a rented GPU, in the order of its worth, and how long each step may take."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from . import commands, correctness, memory, probes, speed
from .plan import Plan, real, rehearsed
from .probes import counting
from .runner import Part, Step
from .state import Found, Record

# Seconds of a call. They add up to more than one call has: what it does not reach, the next does.
SECONDS = {
    "probes": 110, "correctness": 90, "speed": 120, "memory": 50, "tiles": 60, "tests": 165,
    "sanitizer": 95, "peers": 95, "training": 115,
}  # fmt: skip


def steps(rehearsal: bool, fill: Callable[[], Found]) -> list[Step]:
    """`fill` compiles what Triton's cache lacks."""
    parts: dict[str, Callable[[Plan], Sequence[Part]]] = {
        "probes": partial(probes.parts, fill=fill),
        "correctness": correctness.parts,
        "speed": speed.parts,
        "memory": memory.parts,
        "tiles": speed.tile_parts,
        "tests": commands.pytest_parts,
        "sanitizer": commands.sanitizer_parts,
        "peers": commands.peer_parts,
        "training": commands.ladder_parts,
    }
    plan = rehearsed if rehearsal else real

    def of(record: Record, deadline: float, name: str) -> list[Part]:
        made = parts[name](plan(record.machine.get("rates"), deadline))
        return [Part(part.name, partial(_counted, part.run), slow * part.seconds) for part in made]

    slow = 10 if rehearsal else 1  # it is about code, and not about time
    return [Step(name, slow * most, partial(of, name=name)) for name, most in SECONDS.items()]


def _counted(run: Callable[[], Found]) -> Found:
    """It says what it had to compile: a cache that was carried here should have had it."""
    with counting() as compiled:
        try:
            found = run()
        finally:
            print(f"   {compiled.words}", flush=True)
    return replace(found, says=f"{found.says}; {compiled.words}") if compiled.misses else found
