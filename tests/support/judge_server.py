"""A judge over HTTP on this machine that answers as a test wants, and counts what it is asked."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

MODEL = "tiny-judge"
KEY = "sk-secret-0123456789"
Answering = Callable[[dict], Response]


def completion(text: str, finish: str = "stop", **message: object) -> dict:
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": MODEL,
        "choices": [{"index": 0, "finish_reason": finish,
                     "message": {"role": "assistant", "content": text, **message}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }  # fmt: skip


def error(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    body = {"error": {"message": message, "type": "error", "code": code, "param": None}}
    return Response(json.dumps(body), status, headers, content_type="application/json")


def reply(text: str, finish: str = "stop", **message: object) -> Response:
    return Response(json.dumps(completion(text, finish, **message)), 200,
                    content_type="application/json")  # fmt: skip


def shown(body: dict) -> list[str]:
    """The candidates of a question of the default prompts, in the order in which it shows them."""
    asked = body["messages"][0]["content"]
    return re.findall(r"<candidate(?:_\w+)?>\n(.*?)\n</candidate", asked, re.DOTALL)


def by_alphabet(body: dict) -> Response:
    """Prefers the passage that comes first in the alphabet: without a bias to places."""
    first, second = shown(body)
    letter = "A" if first < second else "B"
    return reply(json.dumps({"comparison": "x", "preferred": letter, "confidence": 80}))


def always_first(body: dict) -> Response:
    return reply("Comparison: x\nPreferred: A\nConfidence score: 90")


class JudgeServer:
    """`answering` makes the answers; `asked` counts requests by what they show."""

    def __init__(self, http: HTTPServer, answering: Answering = by_alphabet):
        self.answering, self.http = answering, http
        self.asked: Counter[tuple[str, ...]] = Counter()
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        http.expect_request("/v1/models").respond_with_json(
            {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
        )
        http.expect_request("/v1/chat/completions").respond_with_handler(self._answer)

    @property
    def url(self) -> str:
        return self.http.url_for("/v1")

    def _answer(self, request: Request) -> Response:
        body = request.get_json()
        self.keys.add(request.headers.get("Authorization", ""))
        self.times.append(time.monotonic())
        self.bodies.append(body)
        self.asked[tuple(shown(body))] += 1
        return self.answering(body)


def write_pairs(path: Path, count: int) -> None:
    """Pairs whose better passage, by the alphabet, is the second and the first in turn."""
    rows = [
        {"query": f"query {i}", "passage1": f"{'ba'[i % 2]} {i}", "passage2": f"{'ab'[i % 2]} {i}",
         "query_id": f"q{i}", "passage_rank1": 2, "passage_rank2": 5}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
