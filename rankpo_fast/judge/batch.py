"""OpenAI's batch files: questions out, for a service or `vllm run-batch`, and their results in."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rankpo_fast.config.judge import JudgeConfig, Mode
from rankpo_fast.data.jsonl import objects, value
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.errors import InputError
from rankpo_fast.judge.journal import Journal
from rankpo_fast.judge.questions import Question, answer_to
from rankpo_fast.judge.server import Judge, Server, reply_in
from rankpo_fast.judge.template import Prompt

URL = "/v1/chat/completions"
SUCCESS = 200


def write_batch(
    path: str | Path, todo: Sequence[Question], judge: Judge, prompt: Prompt, config: JudgeConfig
) -> None:
    """A request a line, under the key of its question."""
    server = Server(judge, config, prompt.mode)
    write_jsonl(
        path,
        (
            {
                "custom_id": question.key,
                "method": "POST",
                "url": URL,
                "body": server.body(
                    [
                        {
                            "role": "user",
                            "content": prompt.filled(question.item.query, question.texts),
                        }
                    ],
                    len(question.shown),
                ),
            }
            for question in todo
        ),
    )


def read_batch(
    path: str, todo: Sequence[Question], judges: Sequence[Judge], mode: Mode, journal: Journal
) -> Counter[str]:
    """Results into the journal, less those it has; what became of the lines, by kind.

    InputError names the line of what is no result.
    """
    open_questions = {question.key: question for question in todo}
    judge_of = {judge.name: judge for judge in judges}
    counts: Counter[str] = Counter()
    for where, row in objects(path):
        key = value(row, ("custom_id",), where).value
        if key not in open_questions:
            counts["answered before" if key in journal else "of other questions"] += 1
            continue
        response = row.get("response")
        if row.get("error") or not isinstance(response, dict):
            counts["failed"] += 1
            continue
        if response.get("status_code", SUCCESS) != SUCCESS:
            counts[f"failed with {response['status_code']}"] += 1
            continue
        question = open_questions.pop(key)
        try:
            reply = reply_in(value(response, ("body",), where).value, judge_of[question.judge])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        journal.add(answer_to(question, reply, mode, None))
        counts["taken"] += 1
    if counts["of other questions"]:
        warnings.warn(
            f"{path}: {counts['of other questions']:,} results are of other questions, or of "
            f"another prompt or model: passed over",
            stacklevel=2,
        )
    return counts
