"""What a judge wrote -> its verdict, in terms of the passages as they were shown.

Structured answers are JSON; others end in lines such as "Preferred: B" and "Confidence score: 85",
in whatever markup. An answer that names two verdicts, or none, does not parse.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from rankpo_fast.config.judge import Mode

HIGHEST_GRADE = 3
THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
MARKS = r"[\s*_`\"'#>\[\]({]*"  # of Markdown and JSON, round words
START = rf"(?:^|[{{,.;])[\d.)\-]*{MARKS}"  # of a line, or of an entry of JSON
NOUN = r"(?:(?:candidate|passage|option|answer|response|choice|talent|text)\b[\s_#]*)?"
NAMES = r"(?:final\s+)?(?:preferred|preference|verdict|winner|choice|answer|decision|better)"
CHOICE = r"(?:A|B|tie|equal|neither|both)"
# "Preferred: A or B" repeats the question.
PREFERRED = re.compile(
    rf"{START}{NAMES}{MARKS}{NOUN}{MARKS}(?:is\b)?{MARKS}[:=]{MARKS}{NOUN}{MARKS}"
    rf"(?P<value>{CHOICE})\b(?!['’]|{MARKS}(?:or\b|/|\||,{MARKS}{CHOICE}\b))",
    re.IGNORECASE | re.MULTILINE,
)
BRACKETED = re.compile(r"\[\[(?P<value>A|B|tie|C)\]\]")
ALONE = re.compile(rf"{MARKS}{NOUN}{MARKS}(?P<value>{CHOICE}){MARKS}\.?{MARKS}", re.IGNORECASE)
CONFIDENCE = re.compile(
    rf"{START}(?:my\s+)?confidence{MARKS}(?:score|level)?{MARKS}(?:\(0[^)]*100\))?{MARKS}[:=]{MARKS}"
    r"(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>%|/\s*100?\b)?",
    re.IGNORECASE | re.MULTILINE,
)
GRADE = re.compile(
    rf"{START}(?:final\s+)?(?:grade|score|rating|relevance){MARKS}[:=]{MARKS}(?P<value>[0-3])"
    rf"\b(?!\.\d|{MARKS}(?:or\b|,|to\b))",
    re.IGNORECASE | re.MULTILINE,
)
RANKING = re.compile(
    rf"{START}(?:final\s+)?(?:ranking|order)\b{MARKS}[:=](?P<value>[^A-Za-z\n]+)$",
    re.IGNORECASE | re.MULTILINE,
)
ONLY_NUMBERS = re.compile(r"\s*[\[\d][\[\]\d>,\s]*")


@dataclass(frozen=True)
class Verdict:
    """Attributes:
        value: "A", "B" (the first and the second shown) or "tie"; a grade; or a ranking, places of
            the list shown, from 0, the best first. None: it does not parse.
        confidence: from 0 to 100, if one is stated.
        place: where in the answer the letter or the digit of the verdict stands.
    """

    value: str | int | tuple[int, ...] | None
    confidence: float | None = None
    place: int | None = None


UNPARSED = Verdict(None)


def parse(mode: Mode, answer: str, count: int = 2) -> Verdict:
    """The verdict on `count` passages."""
    # Thoughts become spaces, so that places stay what they are in the answer.
    said = THOUGHTS.sub(lambda found: " " * len(found[0]), answer)
    spans = list(_spans(mode, said, count))
    values = {value for value, _ in spans}
    if len(values) != 1:
        return UNPARSED
    return Verdict(values.pop(), _confidence(said), spans[-1][1])


def _spans(mode: Mode, said: str, count: int) -> Iterator[tuple[Any, int]]:
    """Every verdict in the text, and where it stands."""
    if mode == "pair":
        found = [*PREFERRED.finditer(said), *BRACKETED.finditer(said)]
        for match in found or filter(None, [ALONE.fullmatch(said)]):
            yield _letter(match["value"]), match.start("value")
    elif mode == "grade":
        alone = re.fullmatch(rf"{MARKS}(?P<value>[0-3]){MARKS}\.?\s*", said)
        for match in [*GRADE.finditer(said)] or filter(None, [alone]):
            yield int(match["value"]), match.start("value")
    else:
        alone = ONLY_NUMBERS.fullmatch(said)
        texts = [(m["value"], m.start("value")) for m in RANKING.finditer(said)]
        texts += [(text, place) for text, place in _json_lists(said)]
        for text, place in texts or ([(said, 0)] if alone else []):
            places = tuple(int(number) - 1 for number in re.findall(r"\d+", text))
            if sorted(places) == list(range(count)):
                yield places, place


def _json_lists(said: str) -> Iterator[tuple[str, int]]:
    """Of a "ranking" in JSON that goes over several lines."""
    for match in re.finditer(r'"ranking"\s*:\s*\[(?P<value>[\d\s,"\[\]]*?)\]', said):
        yield match["value"], match.start("value")


def _letter(word: str) -> str:
    return word.upper() if word.upper() in ("A", "B") else "tie"


def _confidence(said: str) -> float | None:
    """The last one stated, on the scale of 0 to 100."""
    found = [*CONFIDENCE.finditer(said)]
    if not found:
        return None
    number, unit = float(found[-1]["value"]), (found[-1]["unit"] or "").replace(" ", "")
    if unit == "/10":
        number *= 10
    elif not unit and "." in found[-1]["value"] and number <= 1:  # 0.85
        number *= 100
    return round(number, 2) if 0 <= number <= 100 else None


def schema(mode: Mode, count: int) -> dict[str, Any]:
    """What `response_format` asks a server for, so that `parse` understands it."""
    reasons = {"type": "string", "description": "two to four sentences that name the evidence"}
    verdicts: dict[str, tuple[str, str, dict[str, Any]]] = {
        "pair": ("comparison", "preferred", {"type": "string", "enum": ["A", "B", "tie"]}),
        "grade": ("assessment", "grade", {"type": "integer", "enum": [0, 1, 2, HIGHEST_GRADE]}),
        "list": ("comparison", "ranking", {"type": "array", "items": {"type": "integer"}}),
    }
    first, name, kind = verdicts[mode]
    if mode == "list":
        kind["description"] = f"the numbers 1 to {count}, each once, the best first"
    properties = {first: reasons, name: kind, "confidence": {"type": "integer"}}
    return {
        "type": "json_schema",
        "json_schema": {
            "name": "verdict",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            },
        },
    }


def probability(place: int, tokens: Sequence[dict[str, Any]], choices: Sequence[str]) -> float | None:
    """Of the verdict at `place` in the answer, among `choices`, by the token that holds it.

    Args:
        tokens: {"token", "logprob", "top_logprobs": [{"token", "logprob"}]} of the whole answer.
    """
    start = 0
    for token in tokens:
        text = token["token"]
        if start <= place < start + len(text):
            weights: dict[str, float] = {}
            for one in (token, *(token.get("top_logprobs") or ())):
                word = re.sub(r"\W", "", one["token"])
                if word in choices:
                    weights.setdefault(word, exp(one["logprob"]))
            own = weights.get(re.sub(r"\W", "", text))
            return None if own is None else own / sum(weights.values())
        start += len(text)
    return None
