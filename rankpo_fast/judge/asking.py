"""Questions -> answers in the journal: many at once, within limits, through a server's troubles.

An answer is on the disk before the next question is asked in its place. A signal stops the asking:
what is under way has a few seconds to come in.
"""

import asyncio
import itertools
import random
import signal
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rankpo_fast.config.judge import JudgeConfig
from rankpo_fast.judge.cost import Budget, Tokens, usage_of
from rankpo_fast.judge.journal import Answer, Journal
from rankpo_fast.judge.questions import Question, Reply, answer_to, verdict_in
from rankpo_fast.judge.server import Judge, Server, Trouble
from rankpo_fast.judge.template import Prompt
from rankpo_fast.progress import progress
from rankpo_fast.signals import not_ignored

GRACE = 4.0  # seconds for answers under way once a signal came
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between tries, where the server asks for none
PATIENCE = 600.0  # seconds: a server that asks for more is asked another day
UNPAID = ("429", "lost connection")  # no answer was made; after a stall or half a reply, who knows
AGAIN = (
    "This answer is not in the form that was asked for. Give your verdict again, in exactly that "
    "form and with one decision."
)


@dataclass
class Outcome:
    """How a run of questions ended.

    Attributes:
        troubles: requests that got no answer, by kind; most were made again.
        left: questions without an answer, or to be asked again as theirs did not parse, by the kind
            of their last trouble; "not asked" where the run ended before.
        why: what ended it early.
        came: the signal that did.
    """

    answered: int = 0
    unparsed: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    why: str | None = None
    came: signal.Signals | None = None


class Pace:
    """So much a minute, spread evenly."""

    def __init__(self, per_minute: float | None):
        self._per_minute, self._free = per_minute, 0.0

    def wait(self, amount: float) -> float:
        """Seconds until it may be taken, which it is."""
        if self._per_minute is None:
            return 0.0
        now = time.monotonic()
        start = max(now, self._free)
        self._free = start + 60 * amount / self._per_minute
        return start - now


def ask(
    todo: Sequence[Question], judges: Sequence[Judge], prompt: Prompt, journal: Journal,
    config: JudgeConfig, tokens: Tokens, *, retry_unparsed: int = 0,
) -> Outcome:  # fmt: skip
    """Ask all of `todo`; every answer is in `journal` when this returns.

    Raises:
        InputError: a server that is not there, refuses the key or lacks the model; nothing was
            asked then.
        OSError: the journal cannot be written.
    """
    asking = _Asking(todo, judges, prompt, journal, config, tokens, retry_unparsed)
    return asyncio.run(asking.run())


class _Asking:
    def __init__(
        self, todo: Sequence[Question], judges: Sequence[Judge], prompt: Prompt, journal: Journal,
        config: JudgeConfig, tokens: Tokens, retry_unparsed: int,
    ):  # fmt: skip
        self.todo, self.judges, self.prompt = todo, {j.name: j for j in judges}, prompt
        self.journal, self.config, self.tokens = journal, config, tokens
        self.retry_unparsed = retry_unparsed
        self.outcome = Outcome()
        self.budget = Budget(self.judges, journal.answers, config.max_cost)
        self.paces = {
            name: (Pace(config.requests_per_minute), Pace(config.tokens_per_minute))
            for name in self.judges
        }
        self.not_before: dict[str, float] = defaultdict(float)  # by judge, after a 429
        self.failed_in_a_row = 0
        # What did not parse, by question, in the order in which it came.
        self.unparsed: dict[str, list[str]] = defaultdict(list)
        for answer in journal.answers:
            if verdict_in(answer, prompt.mode) is None:
                self.unparsed[answer["key"]].append(answer["answer"])

    async def run(self) -> Outcome:
        self.stop = asyncio.Event()
        self.servers = {
            name: Server(judge, self.config, self.prompt.mode)
            for name, judge in self.judges.items()
        }
        try:
            for server in self.servers.values():
                await server.check()
            with progress("asking", len(self.todo), "question") as self.advance:
                await self._work()
        finally:
            for server in self.servers.values():
                await server.close()
        settled = {
            answer["key"] for answer in self.journal.answers
            if verdict_in(answer, self.prompt.mode) is not None
            or len(self.unparsed[answer["key"]]) > self.retry_unparsed
        }  # fmt: skip
        left = sum(question.key not in settled for question in self.todo)
        if missing := left - self.outcome.left.total():
            self.outcome.left["not asked"] = missing
        return self.outcome

    async def _work(self) -> None:
        waiting = iter(self.todo)
        workers = {
            asyncio.create_task(self._worker(waiting))
            for _ in range(min(self.config.concurrency, len(self.todo)))
        }
        cut = asyncio.Event()
        watch = asyncio.create_task(cut.wait())
        with self._signals(cut):
            try:
                running = set(workers)
                while running and not cut.is_set():
                    done, _ = await asyncio.wait(
                        {*running, watch}, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done - {watch}:
                        task.result()  # raises what the task did
                    running -= done
            finally:
                for task in (*workers, watch):
                    task.cancel()
                await asyncio.gather(*workers, watch, return_exceptions=True)

    @contextmanager
    def _signals(self, cut: asyncio.Event) -> Iterator[None]:
        """Inside, signals stop the asking, and set `cut` when what is under way has had
        its time; the second one sets it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stopped(number: signal.Signals) -> None:
            loop.call_later(GRACE if self.outcome.came is None else 0, cut.set)
            self.outcome.came = self.outcome.came or number
            self._end(f"{number.name} came")

        watched = not_ignored()
        before = [signal.getsignal(number) for number in watched]
        for number in watched:
            loop.add_signal_handler(number, stopped, number)
        try:
            yield
        finally:
            for number, handler in zip(watched, before, strict=True):
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _end(self, why: str) -> None:
        self.outcome.why = self.outcome.why or why
        self.stop.set()

    async def _worker(self, waiting: Iterator[Question]) -> None:
        for question in waiting:
            if self.stop.is_set():
                return
            try:
                await self._question(question)
            except Trouble as trouble:
                self._given_up(question, trouble)
            self.advance(1)

    def _given_up(self, question: Question, trouble: Trouble) -> None:
        self.outcome.left[trouble.kind] += 1
        if trouble.fatal:
            self._end(f"{question.judge}: {trouble.kind}: {trouble}")
        if trouble.again:  # of a server in trouble, not of this question
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= max(3, self.config.concurrency):
                self._end(f"{self.failed_in_a_row} questions in a row got no answer (the last: "
                          f"{trouble.kind}: {trouble})")  # fmt: skip

    async def _question(self, question: Question) -> None:
        """Ask it, again where the answer does not parse and that is wanted. Raises Trouble."""
        tried = self.unparsed[question.key]
        while len(tried) <= self.retry_unparsed and not self.stop.is_set():
            text = self.prompt.filled(question.item.query, question.texts)
            messages = [{"role": "user", "content": text}]
            if tried:
                messages += [
                    {"role": "assistant", "content": tried[-1] or "(nothing)"},
                    {"role": "user", "content": AGAIN},
                ]
            answer = await self._paid(question, messages)
            if answer is None:
                return
            self.failed_in_a_row = 0
            if verdict_in(answer, self.prompt.mode) is not None:
                self.outcome.answered += 1
                return
            tried.append(answer["answer"])
            self.outcome.unparsed += 1

    async def _paid(self, question: Question, messages: list[dict[str, str]]) -> Answer | None:
        """The answer, in the journal; None where the money or the time for it is up."""
        judge = self.judges[question.judge]
        prompt = sum(self.tokens.count(message["content"]) for message in messages)
        most = judge.cost(prompt, self.config.max_answer_tokens) or 0.0
        if not self.budget.hold(most):
            self._end(f"the next answer may cost more than is left of --max_cost "
                      f"{self.config.max_cost:g}: {self.budget.spent:.4f} spent")  # fmt: skip
            return None
        spent = 0.0
        try:
            began = time.monotonic()
            reply = await self._reply(question, messages, prompt, most)
            if reply is None:
                return None
            usage = usage_of(reply.usage, prompt, self.tokens.count(reply.text))
            answer = answer_to(question, reply, self.prompt.mode, time.monotonic() - began)
            answer["usage"] = usage
            await asyncio.shield(asyncio.to_thread(self.journal.add, answer))
            spent = self.budget.cost(answer)
            return answer
        finally:
            self.budget.settle(most, spent)

    async def _reply(
        self, question: Question, messages: list[dict[str, str]], prompt: int, most: float
    ) -> Reply | None:
        """None where a signal, or the end of another question, came first. Raises Trouble."""
        server = self.servers[question.judge]
        requests, tokens = self.paces[question.judge]
        for attempt in itertools.count():
            pause = max(self.not_before[question.judge] - time.monotonic(), 0)
            pause = max(pause, requests.wait(1),
                        tokens.wait(prompt + self.config.max_answer_tokens))  # fmt: skip
            if await self._stopped_within(pause):
                return None
            try:
                return await server.ask(messages, len(question.shown))
            except Trouble as caught:
                trouble = caught
            self.outcome.troubles[trouble.kind] += 1
            if trouble.kind not in UNPAID and trouble.again:
                self.budget.spent += most  # perhaps
            if trouble.wait is not None and trouble.wait > PATIENCE:
                said = f"the server asks to wait for {trouble.wait:,.0f} s: run it again then"
                raise Trouble(trouble.kind, said, fatal=True)
            if not trouble.again or attempt == self.config.max_retries:
                raise trouble
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(1, 1.5)
            if trouble.wait is not None:
                wait = trouble.wait
            if trouble.kind == "429":  # all wait: the limit is of the key, not of the question
                until = time.monotonic() + wait
                self.not_before[question.judge] = max(self.not_before[question.judge], until)
                if wait > LONGEST_WAIT:
                    warnings.warn(f"{question.judge}: the server asks to wait for {wait:,.0f} s",
                                  stacklevel=2)  # fmt: skip
            if await self._stopped_within(wait):
                return None
        raise AssertionError

    async def _stopped_within(self, seconds: float) -> bool:
        """Whether the asking was stopped before so many seconds went by."""
        if seconds > 0 and not self.stop.is_set():
            try:
                await asyncio.wait_for(self.stop.wait(), seconds)
            except TimeoutError:
                return False
        return self.stop.is_set()
