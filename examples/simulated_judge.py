"""A judge that is simulated, behind a server that speaks OpenAI's protocol: to try `annotate` with.

    python examples/simulated_judge.py --passages talents.jsonl --bias 0.3 --port 8765
    rankpo-fast annotate --base_url http://127.0.0.1:8765/v1 --model simulated ...

It knows a number for each passage (--score, of the rows of --passages) and prefers a to b with
probability sigmoid(sharpness * (a - b)), Bradley and Terry's model. So large language models do,
and they have habits, which it has too: with probability --bias it takes what it is shown first,
with probability --noise it answers at random. The same question always gets the same answer.
"""

import argparse
import csv
import hashlib
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "simulated"
# As the default prompt of `annotate --mode pair` shows them.
SHOWN = re.compile(r"<candidate_([AB])>\n(.*?)\n</candidate_\1>", re.DOTALL)


class Judge:
    """Preferences between passages by their scores."""

    def __init__(
        self, scores: dict[str, float], *, sharpness: float, bias: float, noise: float, seed: int
    ):
        self.scores, self.sharpness, self.seed = scores, sharpness, seed
        self.bias, self.noise = bias, noise

    def verdict(self, prompt: str) -> dict[str, Any]:
        """The answer to a prompt that shows two passages; KeyError for one that is not known."""
        shown = dict(SHOWN.findall(prompt))
        a, b = self.scores[shown["A"].strip()], self.scores[shown["B"].strip()]
        coin = random.Random(hashlib.sha256(f"{self.seed} {prompt}".encode()).digest())
        likely = 1 / (1 + math.exp(-self.sharpness * (a - b)))
        habit, first = coin.random(), coin.random() < likely
        if habit < self.bias:
            first = True
        elif habit < self.bias + self.noise:
            first = coin.random() < 0.5
        return {
            "comparison": f"A has {a:g} and B has {b:g}.",
            "preferred": "A" if first else "B",
            "confidence_score": round(100 * max(likely, 1 - likely)),
        }


def serve(judge: Judge, port: int = 0) -> ThreadingHTTPServer:
    """A server on this machine; port 0 takes a free one. The caller runs `serve_forever`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = asked["messages"][-1]["content"]
            try:
                text = json.dumps(judge.verdict(prompt))
            except KeyError as error:
                self._send(400, {"error": {"message": f"a passage is not known: {error}"}})
                return
            message = {"role": "assistant", "content": text}
            self._send(200, {
                "id": "0", "object": "chat.completion", "created": 0, "model": MODEL,
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4,
                          "total_tokens": (len(prompt) + len(text)) // 4},
            })  # fmt: skip

        def log_message(self, *_: object) -> None:
            """Says nothing of each request."""

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def read_scores(path: Path, text: str, score: str) -> dict[str, float]:
    """{passage: score} of rows in JSONL or CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        rows: Iterable[dict[str, Any]] = (
            csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file)
        )
        return {row[text].strip(): float(row[score]) for row in rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--passages", type=Path, required=True, help="JSONL or CSV of passages")
    parser.add_argument("--text", default="text", help="their key of the text")
    parser.add_argument("--score", default="quality", help="their key of the number")
    parser.add_argument("--sharpness", type=float, default=6.0)
    parser.add_argument("--bias", type=float, default=0.0, help="how often it takes the first")
    parser.add_argument("--noise", type=float, default=0.0, help="how often it guesses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args(argv)
    judge = Judge(
        read_scores(options.passages, options.text, options.score),
        sharpness=options.sharpness, bias=options.bias, noise=options.noise, seed=options.seed,
    )  # fmt: skip
    server = serve(judge, options.port)
    print(f"{len(judge.scores):,} passages; http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
