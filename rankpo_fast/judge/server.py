"""One judge's server, over OpenAI's protocol: a request, its reply, and what went wrong by kind.

The client's own retries are off: `asking.py` decides what is asked again, and when. The key comes
from the environment and is taken out of whatever the server says.
"""

import asyncio
import json
import os
import re
import time
import warnings
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rankpo_fast.config.judge import JudgeConfig, Mode
from rankpo_fast.errors import InputError
from rankpo_fast.flags import closest
from rankpo_fast.judge.parse import schema
from rankpo_fast.judge.questions import Reply
from rankpo_fast.yaml_files import read_yaml

USUAL_KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # the client wants one; servers of one's own take any
OPENAI = "https://api.openai.com/v1"
TOP_LOGPROBS = 5
HIDDEN = "[key]"
JUDGE_KEYS = ("model", "name", "base_url", "api_key_env", "price_in", "price_out")
# What a 400 names -> the option that this server does without.
OPTIONS = {
    "structured": re.compile(r"response_format|json_schema|guided|structured|grammar", re.I),
    "max_tokens": re.compile(r"max_tokens", re.I),
    "temperature": re.compile(r"temperature", re.I),
    "logprobs": re.compile(r"logprobs", re.I),
}
OVERFLOW = re.compile(
    r"context_length|context length|context window|maximum context|too many tokens|prompt is too "
    r"long|exceeds? the (available )?context|exceed_context", re.I,
)  # fmt: skip
REFUSAL = re.compile(r"content_filter|content_policy|content management|safety", re.I)


@dataclass(frozen=True)
class Judge:
    """Who is asked. Prices are of a token."""

    name: str
    model: str
    base_url: str = OPENAI
    key: str = field(default=NO_KEY, repr=False)
    price_in: float | None = None
    price_out: float | None = None

    def cost(self, tokens_in: float, tokens_out: float) -> float | None:
        if self.price_in is None or self.price_out is None:
            return None
        return tokens_in * self.price_in + tokens_out * self.price_out

    def hidden(self, said: str) -> str:
        """Without the key, should a server repeat it."""
        return said if self.key == NO_KEY else said.replace(self.key, HIDDEN)


def read_judges(config: JudgeConfig) -> list[Judge]:
    """Of the flags, or of the file --judges. InputError for what cannot be asked."""
    if config.judges is None:
        if not config.model:
            raise InputError("nobody is asked: give --model, or --judges")
        prices = {"price_in": config.price_in, "price_out": config.price_out}
        rows = [
            {"model": model, "base_url": config.base_url, "api_key_env": config.api_key_env,
             **prices}
            for model in config.model
        ]  # fmt: skip
        return [_judge(row, "") for row in rows]
    path = config.judges
    rows = read_yaml(Path(path), f"--judges {path}: ", numbers=True)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"--judges {path}: expected a list of judges, - model: ... each")
    judges = [_judge(row, f"{path}: judge {number}: ") for number, row in enumerate(rows, 1)]
    names = [judge.name for judge in judges]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two judges are called {name}: give each a name of its own")
    if config.max_cost is not None and any(judge.price_in is None for judge in judges):
        raise InputError(f"--max_cost needs price_in and price_out of every judge of {path}")
    return judges


def _judge(row: Any, where: str) -> Judge:
    if not isinstance(row, dict) or not isinstance(row.get("model"), str):
        raise InputError(f"{where}expected keys and values, model among them")
    for name in row:
        if name not in JUDGE_KEYS:
            raise InputError(f"{where}unknown key {name}{closest(str(name), [*JUDGE_KEYS])}")
    prices = [row.get(name) for name in ("price_in", "price_out")]
    for price in prices:
        if price is not None and (type(price) not in (int, float) or price < 0):
            raise InputError(f"{where}a price must be a number >= 0, got {price!r}")
    if (prices[0] is None) != (prices[1] is None):
        raise InputError(f"{where}price_in and price_out go together")
    url = row.get("base_url") or OPENAI
    parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError(f"{where}--base_url must be as http://localhost:8000/v1, got {url!r}")
    if "@" in parts.netloc:
        raise InputError(f"{where}--base_url must hold no password: --api_key_env names a variable "
                         f"of the environment")  # fmt: skip
    variable = row.get("api_key_env")
    key = os.environ.get(variable or USUAL_KEY, "").strip()
    if not key and (variable or url == OPENAI):
        raise InputError(f"{where}--api_key_env {variable or USUAL_KEY}: this variable of the "
                         f"environment is not set")  # fmt: skip
    per_token = [None if price is None else price / 1e6 for price in prices]
    return Judge(str(row.get("name") or row["model"]), row["model"], url, key or NO_KEY, *per_token)


class Trouble(Exception):
    """A question that got no answer.

    Attributes:
        kind: by which it is counted.
        again: whether it may be asked again.
        wait: seconds that the server asks to wait for.
        fatal: whether no other question would fare better.
    """

    def __init__(
        self, kind: str, said: str, *, again: bool = False, wait: float | None = None,
        fatal: bool = False,
    ):  # fmt: skip
        super().__init__(said)
        self.kind, self.again, self.wait, self.fatal = kind, again, wait, fatal


class Server:
    """An open connection to a judge; options that it refuses are left out from then on."""

    def __init__(self, judge: Judge, config: JudgeConfig, mode: Mode):
        import openai

        self.judge, self._mode, self._config = judge, mode, config
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=judge.key, base_url=judge.base_url, timeout=config.timeout, max_retries=0
        )
        self._without = {name for name in ("structured", "logprobs") if not getattr(config, name)}

    async def close(self) -> None:
        await self._client.close()

    async def check(self) -> None:
        """InputError where the server is not there, refuses the key, or lacks the model."""
        judge = self.judge
        try:
            served = [model.id async for model in self._client.models.list()]
        except self._openai.APIConnectionError as error:
            raise InputError(f"--base_url {judge.base_url}: no server answers there: "
                             f"{judge.hidden(_cause(error))}") from None  # fmt: skip
        except (self._openai.AuthenticationError, self._openai.PermissionDeniedError) as error:
            raise InputError(f"--base_url {judge.base_url} refuses the key: "
                             f"{self._said(error)}") from None  # fmt: skip
        except (self._openai.APIError, ValueError, TypeError, AttributeError):
            warnings.warn(f"{judge.base_url} does not list its models: whether it has "
                          f"{judge.model} shows when it is asked", stacklevel=2)  # fmt: skip
            return
        if served and judge.model not in served:
            near = closest(judge.model, served)
            raise InputError(f"--model {judge.model}: {judge.base_url} has {', '.join(served[:10])}"
                             f"{', ...' if len(served) > 10 else ''}{near}")  # fmt: skip

    def body(self, messages: list[dict[str, str]], count: int) -> dict[str, Any]:
        """Of the request for a verdict on `count` passages."""
        without, config = self._without, self._config
        body: dict[str, Any] = {"model": self.judge.model, "messages": messages}
        limit = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
        body[limit] = config.max_answer_tokens
        if "temperature" not in without:
            body["temperature"] = config.temperature
        if "structured" not in without:
            body["response_format"] = schema(self._mode, count)
        if "logprobs" not in without:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body

    async def ask(self, messages: list[dict[str, str]], count: int) -> Reply:
        """One request, or one more for each option that the server refuses. Raises Trouble."""
        while True:
            without = {*self._without}
            try:
                return await self._ask(self.body(messages, count))
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                said = self._said(error)
                if OVERFLOW.search(said):
                    raise Trouble("context overflow", said) from None
                if REFUSAL.search(said):
                    raise Trouble("refused by a filter", said) from None
                if not self._does_without(said, without):
                    raise Trouble("bad request", said) from None

    def _does_without(self, said: str, before: set[str]) -> bool:
        """Whether something can be left out that the server refuses, or was since the request."""
        if self._without != before:
            return True
        named = [name for name, sign in OPTIONS.items() if sign.search(said)]
        left = [name for name in (*named, "structured") if name not in self._without]
        if not left:
            return False
        self._without.add(left[0])
        instead = " (max_completion_tokens in its place)" if left[0] == "max_tokens" else ""
        warnings.warn(f"{self.judge.name}: {self.judge.base_url} refuses a request with "
                      f"{left[0]}: goes without{instead} ({said[:200]})", stacklevel=2)  # fmt: skip
        return True

    async def _ask(self, body: dict[str, Any]) -> Reply:
        openai = self._openai
        try:
            async with asyncio.timeout(self._config.timeout):  # the client's is of each read
                raw = await self._client.chat.completions.with_raw_response.create(**body)
            return _reply(json.loads(raw.content), self.judge)
        except (openai.APITimeoutError, TimeoutError):
            raise Trouble("timeout", "no answer in time", again=True) from None
        except openai.APIConnectionError as error:
            said = self.judge.hidden(_cause(error))
            raise Trouble("lost connection", said, again=True) from None
        except openai.RateLimitError as error:
            said = self._said(error)
            spent = "insufficient_quota" in said
            wait = retry_after(error.response.headers)
            raise Trouble("429", said, again=not spent, wait=wait, fatal=spent) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError,
                openai.NotFoundError) as error:  # fmt: skip
            raise Trouble(str(error.status_code), self._said(error), fatal=True) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            raise
        except openai.APIStatusError as error:
            passing = error.status_code >= 500 or error.status_code in (408, 409)
            wait = retry_after(error.response.headers)
            raise Trouble(
                str(error.status_code), self._said(error), again=passing, wait=wait
            ) from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            said = self.judge.hidden(f"no reply of this protocol: {error!r}")[:200]
            raise Trouble("malformed reply", said, again=True) from None

    def _said(self, error: Any) -> str:
        """By the server, without the key."""
        body = error.body
        if isinstance(body, dict):
            error_in = body.get("error")
            inner: dict[str, Any] = error_in if isinstance(error_in, dict) else body
            said = " ".join(str(inner[k]) for k in ("code", "message", "detail") if inner.get(k))
        else:
            said = ""
        return self.judge.hidden(" ".join((said or str(error)).split()))[:500]


def _reply(body: dict[str, Any], judge: Judge) -> Reply:
    """KeyError and its like where `body` is no chat completion."""
    choice = body["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text = message.get("content") or ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    refusal = message.get("refusal")
    if refusal is None and finish == "content_filter":
        refusal = ""
    usage = body.get("usage")
    tokens = (choice.get("logprobs") or {}).get("content") or ()
    return Reply(
        judge.hidden(text), finish, None if refusal is None else judge.hidden(str(refusal)),
        usage if isinstance(usage, dict) else None, tokens,
    )  # fmt: skip


def reply_in(body: dict[str, Any], judge: Judge) -> Reply:
    """Of the body of a response that came by file; InputError where it is no chat completion."""
    try:
        return _reply(body, judge)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"no chat completion: {error!r}") from None


def retry_after(headers: Any) -> float | None:
    """Seconds, of a number or a date; None where the server says nothing of use."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        said = headers.get(name)
        if said is None:
            continue
        try:
            return max(0.0, float(said) / unit)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
        except (ValueError, TypeError):
            continue
    return None


def _cause(error: BaseException) -> str:
    """The innermost words: `Connection error.` alone says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
