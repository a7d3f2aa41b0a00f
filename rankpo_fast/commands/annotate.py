"""`rankpo-fast annotate`: pairs -> judges -> preferences, with a report on the judges."""

import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rankpo_fast.config.judge import AnnotateConfig, JudgeConfig, PeopleConfig
from rankpo_fast.data.files import whole_file
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.errors import InputError, QuestionsLeft
from rankpo_fast.extras import EXTRAS, lacks
from rankpo_fast.judge.asking import Outcome, ask
from rankpo_fast.judge.batch import read_batch, write_batch
from rankpo_fast.judge.consensus import Said, agreement, answers_by_key, by_judges, results
from rankpo_fast.judge.cost import Tokens
from rankpo_fast.judge.journal import Answer, Journal
from rankpo_fast.judge.people import verdicts
from rankpo_fast.judge.questions import (
    OF_PAIRS,
    Item,
    Question,
    questions,
    read_items,
    verdict_in,
)
from rankpo_fast.judge.report import as_text, judged_rows, report
from rankpo_fast.judge.server import Judge, read_judges
from rankpo_fast.judge.template import Prompt, default_prompt, read_prompt, read_text

INSTRUCTIONS = (
    "Which of the two answers the request better? Look for evidence in the texts: what was done, "
    "and what of it the request asks for. Length and style do not count."
)


def run(judging: JudgeConfig, people: PeopleConfig, config: AnnotateConfig) -> None:
    """Raises InputError for what the user can put right, most of it before a question is asked, and
    QuestionsLeft where some got no answer."""
    if config.write_prompt is not None:
        with whole_file(config.write_prompt) as temporary:
            temporary.write_text(default_prompt(config.mode), encoding="utf-8")
        print(f"the prompt of --mode {config.mode} in {config.write_prompt}")
    elif config.report_on is not None:
        _report_on(config)
    elif people.people:
        _ask_people(people, config)
    else:
        _annotate(judging, config)


def _annotate(judging: JudgeConfig, config: AnnotateConfig) -> None:
    judges = read_judges(judging)
    prompt = read_prompt(config.mode, config.prompt)
    assert config.pairs is not None  # of the settings' own check
    items = read_items(config.pairs, config.mode)
    tokens = Tokens(config.tokenizer)
    names = [judge.name for judge in judges]
    everything = list(questions(items, names, prompt, config.both))
    asked = {"mode": config.mode, "prompt": prompt.digest, "temperature": judging.temperature}
    with Journal(config.journal_path, asked, writes=not config.dry_run) as journal:
        todo = _open(everything, journal, config)
        had = len(everything) - len(todo)
        print(f"{len(items):,} {_unit(config)}, {len(everything):,} questions to "
              f"{', '.join(names)}; {had:,} are answered in {journal.path}")  # fmt: skip
        if config.dry_run:
            _say_cost(todo, judges, prompt, judging, tokens)
            return
        if config.batch_out is not None:
            if len(judges) > 1:
                raise InputError("--batch_out is for one judge: such files are run by one model")
            write_batch(config.batch_out, todo, judges[0], prompt, judging)
            print(f"{len(todo):,} requests in {config.batch_out}; give the results to --batch_in")
            return
        outcome = Outcome()
        if config.batch_in is not None:
            counts = read_batch(config.batch_in, todo, judges, config.mode, journal)
            print(f"{config.batch_in}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
            known = {answer["key"] for answer in journal.answers}
            missing = sum(question.key not in known for question in todo)
            outcome.left.update({"no result": missing} if missing else {})
        elif todo:
            outcome = ask(todo, judges, prompt, journal, judging, tokens,
                          retry_unparsed=config.retry_unparsed)  # fmt: skip
        _say(outcome)
        if outcome.came is not None:
            raise QuestionsLeft(
                f"{outcome.why}: {outcome.left.total():,} questions are left; all answers are in "
                f"{journal.path}, and the same command goes on", 128 + outcome.came,
            )  # fmt: skip
        answers = answers_by_key(journal.answers, config.mode)
        of_item: dict[str, list[Question]] = defaultdict(list)
        for question in everything:
            of_item[question.item.key].append(question)
        said = [by_judges(of_item[item.key], answers, config) for item in items]
        by_name = {judge.name: judge for judge in judges}
        _write(items, said, journal.answers, by_name, outcome, config)
    if left := outcome.left.total():
        kinds = _kinds(outcome.left)
        why = f" ({outcome.why})" if outcome.why else ""
        raise QuestionsLeft(f"{left:,} questions have no answer: {kinds}{why}; the same command "
                            f"asks them again", 1)  # fmt: skip


def _ask_people(people: PeopleConfig, config: AnnotateConfig) -> None:
    """Serve the page until it is stopped, then write what has been judged so far."""
    from rankpo_fast.judge.page import serve_page

    instructions = read_text("--prompt", config.prompt) if config.prompt else INSTRUCTIONS
    assert config.pairs is not None  # of the settings' own check
    items = read_items(config.pairs, "pair")
    rows = [dict(zip(("query", *OF_PAIRS), (item.query, *item.passages), strict=True))
            for item in items]  # fmt: skip
    with Journal(config.journal_path, {"people": instructions}) as journal:
        with serve_page(rows, journal, host=people.host, port=people.port,
                        instructions=instructions) as server:  # fmt: skip
            print(f"{len(items):,} pairs at {server.url}\nanswers are in {journal.path}; Ctrl-C "
                  f"ends, and the same command goes on", flush=True)  # fmt: skip
            server.serve_until(people.annotators)
        said: dict[str, dict[str, Said]] = defaultdict(dict)
        for answer in (answers := verdicts(journal.answers)):
            verdict, sure = answer["preferred"], answer["confidence"]
            state = "unparsed" if verdict is None else "verdict"  # None: skipped
            said[answer["pair"]][answer["judge"]] = Said(state, verdict, sure)
    names = {answer["judge"] for answer in answers}
    judges = {name: Judge(name, name) for name in names}
    _write(items, [said[item.key] for item in items], answers, judges, Outcome(), config)


def _unit(config: AnnotateConfig) -> str:
    return "pairs" if config.mode == "pair" else "lists of passages"


def _open(
    everything: Sequence[Question], journal: Journal, config: AnnotateConfig
) -> list[Question]:
    """Those without an answer, or whose answers so far do not parse and may be asked for again."""
    parsed: set[str] = set()
    tried: dict[str, int] = defaultdict(int)
    for answer in journal.answers:
        if verdict_in(answer, config.mode) is not None:
            parsed.add(answer["key"])
        tried[answer["key"]] += 1
    return [
        question
        for question in everything
        if question.key not in parsed and tried[question.key] <= config.retry_unparsed
    ]


def _say_cost(
    todo: Sequence[Question], judges: Sequence[Judge], prompt: Prompt, judging: JudgeConfig,
    tokens: Tokens,
) -> None:  # fmt: skip
    how = "by --tokenizer" if tokens.exact else "estimated, a token being 4 bytes"
    for judge in judges:
        own = [question for question in todo if question.judge == judge.name]
        sent = sum(tokens.count(prompt.filled(q.item.query, q.texts)) for q in own)
        most = len(own) * judging.max_answer_tokens
        cost = judge.cost(sent, most)
        money = "no prices are given" if cost is None else f"at most {cost:,.4f}"
        print(f"{judge.name}: {len(own):,} requests, {sent:,} tokens of prompts ({how}), at most "
              f"{most:,} of answers; {money}")  # fmt: skip


def _kinds(counts: Mapping[str, int]) -> str:
    """The number behind the kind: 23 of 503 would read as 23,503."""
    return ", ".join(f"{kind} ({count:,})" for kind, count in counts.items())


def _say(outcome: Outcome) -> None:
    if outcome.troubles:
        print(f"requests without an answer: {_kinds(outcome.troubles)}", file=sys.stderr)
    if outcome.unparsed:
        warnings.warn(f"{outcome.unparsed:,} answers do not parse: kept in the journal, and asked "
                      f"again as --retry_unparsed says", stacklevel=2)  # fmt: skip


def _write(
    items: Sequence[Item], said: Sequence[dict[str, Said]], answers: Sequence[Answer],
    judges: dict[str, Judge], outcome: Outcome, config: AnnotateConfig,
) -> None:  # fmt: skip
    """The rows, the ties where they are wanted, and the report."""
    found = results(items, said, config)
    assert config.output is not None  # of the settings' own check
    write_jsonl(config.output, found.rows)
    parts = [f"{count:,} {what.replace('_', ' ')}" for what, count in found.counts.items()
             if what != "rows" and count]  # fmt: skip
    print(f"{len(found.rows):,} rows in {config.output}" + "".join(f", {part}" for part in parts))
    if config.ties_file is not None:
        write_jsonl(config.ties_file, found.ties)
        print(f"{len(found.ties):,} ties in {config.ties_file}")
    figures = report(
        config.mode, items, answers, said, judges,
        agreement=agreement(said, config.mode), output=found.counts,
        troubles=dict(outcome.troubles), left=dict(outcome.left),
    )  # fmt: skip
    _write_report(figures, config)


def _report_on(config: AnnotateConfig) -> None:
    assert config.report_on is not None
    items, answers, said = judged_rows(config.report_on)
    judges = {answer["judge"]: Judge(answer["judge"], answer["judge"]) for answer in answers}
    _write_report(report("pair", items, answers, said, judges), config)


def _write_report(figures: dict, config: AnnotateConfig) -> None:
    print(as_text(figures))
    with whole_file(config.report_path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if lacks("plots"):
        names = ", ".join(EXTRAS["plots"])
        print(f"report in {config.report_path}; its picture needs {names}: pip install "
              f"'rankpo-fast[plots]'")  # fmt: skip
        return
    from rankpo_fast.judge.picture import png

    with whole_file(config.picture_path) as temporary:
        temporary.write_bytes(png(figures))
    print(f"report in {config.report_path} and {config.picture_path}")
