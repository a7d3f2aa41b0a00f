"""Pairs to judge, and a server of the annotators' page in a process of its own."""

import json
import socket
import subprocess
import sys

PAIRS = [{"query": f"job {i}", "passage1": f"a{i}", "passage2": f"b{i}"} for i in range(3)]
# What the command does: open the journal, serve, say where.
PROGRAM = """
import json, sys
from pathlib import Path
from rankpo_fast.judge.journal import Journal
from rankpo_fast.judge.page import serve_page
pairs, journal, port = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with Journal(journal, {"prompt": "who fits?"}) as answers:
    with serve_page(pairs, answers, port=port, instructions="who fits?") as server:
        print(server.url, flush=True)
        print("all judged" if server.serve_until(annotators=1) else "stopped")
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def serving(journal, port, pairs=PAIRS):
    """(process, address) of a server of its own."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(pairs), str(journal), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()
