"""What a kernel's machine code says of its speed, and of one of its mistakes.

`nvdisasm -c` prints SASS; `read` makes instructions of it, `tile_code` finds the straight path of a
usual tile through them. What follows a tile's last tensor instruction, up to the exit or the jump
back for the next tile, is its epilogue, in which it gives tensor cores nothing to do.

Branches: the path is the shortest that stores something, so that work a tile may skip (a loop of no
steps, keys that no tile has, the slower of two forms) is not counted; `reachable` counts it all.
A loop within the epilogue is counted once, as is a function's call without the function.

`proxy_fence` reads PTX: wgmma may not see what ordinary stores and cp.async wrote into shared
memory, which it reads another way, before a fence.
"""

import re
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TENSOR = ("HGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTCQMMA")  # sm_90, sm_80, sm_100
GLOBAL_STORES = ("STG", "ST", "RED", "REDG", "ATOMG", "UTMASTG", "UTMAREDG")
# Pipes that issue an instruction of a warp in two clocks and more: CUDA's programming guide,
# "Throughput of Native Arithmetic Instructions", compute capability 9.0: 64 results a clock of a
# multiprocessor for compares, selects, integers and conversions, 16 of special functions.
ALU = {
    "F2FP", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "HMNMX2", "I2FP", "IABS", "IADD3", "IMNMX",
    "ISETP", "LEA", "LOP3", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD",
    "VIADDMNMX", "VIMNMX", "VOTE",
}  # fmt: skip
SPECIAL = {"F2F", "F2I", "FRND", "I2F", "MUFU", "POPC"}
MEMORY = {"ATOMS", "LDG", "LDS", "LDSM", "LDT", "LDTM", "RED", "SHFL", "STG", "STS", "STSM"}

_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P[0-9T]+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)"
    r"(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^(?P<label>\.L_\S+):")
_TARGET = re.compile(r"`\((?P<label>\.L_\S+?)\)")
_WIDTH = re.compile(r"\.(8|16|32|64|128)\b")


@dataclass(frozen=True)
class Instruction:
    name: str  # with its modifiers, as STG.E.128
    operands: str
    guarded: bool  # by a predicate
    target: str | None  # label of what it names

    @property
    def op(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_tensor(self) -> bool:
        return self.op in TENSOR

    @property
    def stores(self) -> bool:
        return self.op in GLOBAL_STORES

    @property
    def bytes(self) -> int:
        """Of a thread, where it is a load or a store."""
        width = _WIDTH.search(self.name)
        return int(width[1]) // 8 if width else 4


@dataclass(frozen=True)
class Code:
    instructions: Sequence[Instruction]
    labels: dict[str, int]  # position of the instruction that follows

    def next_of(self, at: int) -> Iterator[int]:
        """Where a warp may go from here."""
        it, last = self.instructions[at], at + 1 >= len(self.instructions)
        jumps = it.op in ("BRA", "WARPSYNC") and it.target in self.labels
        if jumps and it.target:
            yield self.labels[it.target]
        stops = it.op in ("EXIT", "RET", "BRX", "JMX", "KILL") and not it.guarded
        # a branch may have its condition among its operands, as BRA.U UP0, `(.L_1)
        leaves = it.op == "BRA" and not it.guarded and it.operands.strip().startswith("`")
        if not last and not stops and not leaves:
            yield at + 1


@dataclass(frozen=True)
class Counts:
    """Of instructions, a thread."""

    all: int = 0
    alu: int = 0
    special: int = 0
    memory: int = 0
    stored_bytes: int = 0  # to global memory, not by bulk copies
    bulk_stores: int = 0

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> "Counts":
        these = [it for it in instructions if it.op != "NOP"]
        ops = Counter(it.op for it in these)
        sum_of = lambda names: sum(ops[name] for name in names)  # noqa: E731
        stored = sum(it.bytes for it in these if it.op in ("STG", "ST"))
        bulk = sum(it.op.startswith("UTMA") and it.stores for it in these)
        return cls(len(these), sum_of(ALU), sum_of(SPECIAL), sum_of(MEMORY), stored, bulk)


@dataclass(frozen=True)
class TileCode:
    """Of a usual tile, in one of the kernel's consumers: warps that multiply, with own code."""

    prologue: Counts  # up to the first tensor instruction, from the entry or the jump back
    epilogue: Counts  # after the last tensor instruction, on the straight path
    reachable: int  # instructions that may follow, on any path
    loops: bool  # jumps back for the next tile


def disassemble(cubin: Path, nvdisasm: str) -> str:
    command = [nvdisasm, "-c", "-ndf", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(sass: str) -> Code:
    """Of a module that holds one kernel; functions that it calls follow it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label["label"]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found["operands"])
            to, guarded = target["label"] if target else None, found["guard"] is not None
            instructions.append(Instruction(found["name"], found["operands"], guarded, to))
    return Code(instructions, labels)


def tile_code(code: Code) -> list[TileCode]:
    """Of each consumer; none where there is no tensor instruction."""
    found: list[tuple[set[int], TileCode]] = []
    for at, it in enumerate(code.instructions):
        if not it.is_tensor or (path := _epilogue(code, at)) is None:
            continue
        follows = _reachable(code, at)
        jump = next((to for to in code.next_of(path[-1]) if to <= at), None)
        start = 0 if jump is None else jump
        prologue = _path(code, start, lambda at: code.instructions[at].is_tensor) or []
        tile = TileCode(
            _counts(code, prologue[:-1]), _counts(code, path[1:]), len(follows), jump is not None
        )
        # the same code after another tensor instruction, as after the loop over what remains
        same = [each for each in found if 2 * len(each[0] & follows) > len(follows)]
        if not same:
            found.append((follows, tile))
        elif tile.epilogue.all < same[0][1].epilogue.all:
            found[found.index(same[0])] = (follows, tile)
    return [tile for _, tile in found]


def _epilogue(code: Code, tensor: int) -> list[int] | None:
    """Positions from this tensor instruction to the end of its tile, without another and with a
    store; None where a further product always lies between."""
    is_tensor = lambda at: code.instructions[at].is_tensor and at != tensor  # noqa: E731
    to_store = _path(code, tensor, lambda at: code.instructions[at].stores, is_tensor)
    if to_store is None:
        return None
    back = lambda at: any(to <= tensor for to in code.next_of(at) if to != at + 1)  # noqa: E731
    stop = lambda at: code.instructions[at].is_tensor  # noqa: E731
    rest = _path(code, to_store[-1], back, stop)
    rest = rest or _path(code, to_store[-1], lambda at: _exits(code, at), stop)
    return None if rest is None else to_store + rest[1:]


def _exits(code: Code, at: int) -> bool:
    return code.instructions[at].op == "EXIT"


def _path(
    code: Code, start: int, ends: Callable[[int], bool],
    avoids: Callable[[int], bool] = lambda at: False,
) -> list[int] | None:  # fmt: skip
    """The shortest from `start` to where it `ends`, both included."""
    before: dict[int, int] = {start: -1}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        if ends(at):
            path = [at]
            while (at := before[at]) >= 0:
                path.append(at)
            return path[::-1]
        for to in code.next_of(at):
            if to not in before and not avoids(to):
                before[to] = at
                queue.append(to)
    return None


def _reachable(code: Code, tensor: int) -> set[int]:
    """After a tensor instruction and before another or the jump back."""
    seen: set[int] = set()
    queue = deque([tensor])
    while queue:
        for to in code.next_of(queue.popleft()):
            if to > tensor and to not in seen and not code.instructions[to].is_tensor:
                seen.add(to)
                queue.append(to)
    return seen


def _counts(code: Code, path: Sequence[int]) -> Counts:
    return Counts.of(code.instructions[at] for at in path)


_PTX_LABEL = re.compile(r"^\s*(?P<label>\$L\w+):")
_PTX_JUMP = re.compile(r"\bbra(?:\.uni)?\s+(?P<label>\$L\w+)")
_STORE = re.compile(r"\bst(?:\.\w+)*\.shared|\bstmatrix\.")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared")
_LANDS = re.compile(r"\bcp\.async\.wait_|\bmbarrier\.(?:try|test)_wait")
ON_ITS_WAY, WRITTEN = 1, 2  # of shared memory, since the last fence


def proxy_fence(ptx: str) -> bool:
    """Whether no product by wgmma reads what the other proxy wrote without fence.proxy.async in
    between. Bulk copies need none; where they fill the operands, ordinary stores are not theirs
    (sums on their way between warps)."""
    lines = ptx.splitlines()
    found = ((_PTX_LABEL.match(line), at) for at, line in enumerate(lines))
    labels = {label["label"]: at for label, at in found if label}
    bulk = "cp.async.bulk.tensor" in ptx
    # partitions begin beside each other: what one copies another multiplies, on no common path
    first = ON_ITS_WAY if "setmaxnreg" in ptx and _COPY.search(ptx) else 0
    states = {0: first}  # by line, all that may hold before it
    queue = deque([0])
    while queue:
        at = queue.popleft()
        line = lines[at].partition("//")[0]
        if "wgmma.mma_async" in line and states[at] & WRITTEN:
            return False
        after = _after(line, states[at], bulk)
        for to in _next_lines(line, at, labels):
            known = states.get(to)
            if to < len(lines) and (known is None or known | after != known):
                states[to] = after | (known or 0)
                queue.append(to)
    return True


def _after(line: str, state: int, bulk: bool) -> int:
    if "fence.proxy.async" in line:
        return state & ~WRITTEN
    if _COPY.search(line):
        return state | ON_ITS_WAY
    if _STORE.search(line) and not bulk:
        return state | WRITTEN
    if _LANDS.search(line) and state & ON_ITS_WAY:
        return state | WRITTEN  # others may be on their way still
    return state


def _next_lines(line: str, at: int, labels: dict[str, int]) -> Iterator[int]:
    text = line.strip()
    jump = _PTX_JUMP.search(text)
    if jump and jump["label"] in labels:
        yield labels[jump["label"]]
    if "brx.idx" in text:
        yield from labels.values()
    ends = text.startswith(("ret;", "exit;", "bra", "brx.idx"))  # a guard stands before
    if not ends:
        yield at + 1
