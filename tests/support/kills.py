"""SIGKILL at the n-th system call that changes a file system, whoever makes it: Python, or a
library in Rust or C++ in a thread of its own.

A filter of system calls (seccomp) stops the process before each of these, and a process that
watches it (ptrace) counts them, and kills. What the kernel was told before is done, nothing of what
comes after: as SIGKILL leaves it at any other time in between, but for files half written.
"""

import ctypes
import os
import platform
import signal
import struct
from pathlib import Path

# Numbers by machine, of what Linux has there.
NUMBERS = {
    "x86_64": {
        "write": 1, "open": 2, "pwrite64": 18, "fsync": 74, "fdatasync": 75, "truncate": 76,
        "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87,
        "symlink": 88, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
        "linkat": 265, "symlinkat": 266, "renameat2": 316,
    },
    "aarch64": {
        "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38,
        "truncate": 45, "ftruncate": 46, "write": 64, "pwrite64": 68, "fsync": 82, "fdatasync": 83,
        "openat": 56, "renameat2": 276,
    },
}  # fmt: skip
TRACEME, CONT, SETOPTIONS, GETEVENTMSG = 0, 7, 0x4200, 0x4201
FORKS, SECCOMP_EVENT = (1, 2, 3), 7
OPTIONS = 0x100000 | sum(1 << event for event in (*FORKS, SECCOMP_EVENT))  # the first: end with me
ALLOW, TRACE = 0x7FFF0000, 0x7FF00000
LOAD, EQUAL, ABOVE, HAS, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # of the filter's machine
# Of these calls only those whose argument of that number is so: what goes to standard output and
# error changes no file system, nor does what is opened to be read.
ONLY = {"write": (0, ABOVE, 2), "open": (1, HAS, os.O_CREAT), "openat": (2, HAS, os.O_CREAT)}
WALL = 0x40000000  # wait for threads too

if os.name == "posix":
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    _libc.ptrace.restype = ctypes.c_long


def killed_before(call: int | None, record: Path) -> None:
    """Returns in a child of this process, which is killed before its call number `call`, counted
    from 0 (None: not at all). This process ends as the child does, and leaves in `record` the names
    of the calls that it saw, one a line.

    Raises OSError where the system lets nobody watch a process.
    """
    child = os.fork()
    if child == 0:
        _check(_libc.ptrace(TRACEME, 0, None, None))
        os.kill(os.getpid(), signal.SIGSTOP)
        _stop_before_changes()
        return
    calls, status = _watch(child, call)
    record.write_text("".join(f"{name}\n" for name in calls))
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def can_watch() -> bool:
    """Whether this system lets a process watch its child."""
    if platform.machine() not in NUMBERS:
        return False
    child = os.fork()
    if child == 0:
        try:
            _check(_libc.ptrace(TRACEME, 0, None, None))
            _stop_before_changes()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _stop_before_changes() -> None:
    """From here on, each such call of this process and its children stops it for who watches."""
    code = [(LOAD, 0, 0, 0)]  # the number of the call
    for index, (name, number) in enumerate(NUMBERS[platform.machine()].items()):
        stop = (RETURN, 0, 0, TRACE | index)
        if name in ONLY:
            argument, compare, value = ONLY[name]
            code += [(EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * argument)]
            code += [(compare, 0, 1, value), stop, (LOAD, 0, 0, 0)]
        else:
            code += [(EQUAL, 0, 1, number), stop]
    code.append((RETURN, 0, 0, ALLOW))
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    held = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(held))
    _check(_libc.prctl(38, 1, 0, 0, 0))  # no new privileges, which a filter asks for
    _check(_libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0))


def _watch(child: int, call: int | None) -> tuple[list[str], int]:
    """The calls it made, the last of them that which it was killed before, and its status."""
    names, message = [*NUMBERS[platform.machine()]], ctypes.c_ulong()
    calls: list[str] = []
    known = {child}
    os.waitpid(child, WALL)
    _check(_libc.ptrace(SETOPTIONS, child, None, OPTIONS))
    _check(_libc.ptrace(CONT, child, None, None))
    while True:
        thread, status = os.waitpid(-1, WALL)
        if not os.WIFSTOPPED(status):
            if thread == child:
                return calls, status
            continue
        event, stopped_by = status >> 16, os.WSTOPSIG(status)
        first = thread not in known
        known.add(thread)
        if event == SECCOMP_EVENT:
            _libc.ptrace(GETEVENTMSG, thread, None, ctypes.byref(message))
            calls.append(names[message.value])
            if len(calls) - 1 == call:
                os.kill(child, signal.SIGKILL)
                continue
        # A new thread begins with a stop of the tracing's own; other signals are the process's.
        own = event or (first and stopped_by == signal.SIGSTOP)
        _libc.ptrace(CONT, thread, None, None if own else stopped_by)
