"""What a judge wrote -> its verdict, in terms of the passages as they were shown.

Structured answers are JSON; others end in lines such as "Preferred: B" and "Confidence score: 85",
in whatever markup. An answer that names two verdicts, or none, does not parse.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from rankpo_fast.config.judge import Mode

HIGHEST_GRADE = 3
THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
# Of Markdown and JSON, round words. Marks are never given back (*+): several of these in a row
# would try all ways to share them out, and a judge that has lost its way writes thousands.
MARKS = r"[\s*_`\"'#>\[\]({]*+"
# Of a line, or of an entry of JSON; of several braces or points in a row the first alone, and no
# line but its own: each of them would read all that follow.
START = r"(?:^|(?<!\{)\{|(?<!\.)\.|[,;])[\d.)\-]*+(?:[^\S\n]|[*_`\"'#>\[\]({])*+"
NOUN = r"(?:(?:candidate|passage|option|answer|response|choice|talent|text)\b[\s_#]*+)?"
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
    rf"{START}(?:my\s+)?confidence{MARKS}(?:score|level)?{MARKS}(?:0[^)]*100\))?{MARKS}[:=]{MARKS}"
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
KEYS = {"pair": "preferred", "grade": "grade", "list": "ranking"}  # of JSON
ONLY_GRADE = re.compile(rf"{MARKS}(?P<value>[0-3]){MARKS}\.?\s*")
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
    structured = _of_json(mode, said, count)
    if structured is not None:
        return structured
    spans = list(_spans(mode, said, count))
    values = {value for value, _ in spans}
    if len(values) != 1:
        return UNPARSED
    return Verdict(values.pop(), _confidence(said), spans[-1][1])


def _of_json(mode: Mode, said: str, count: int) -> Verdict | None:
    """Of the last object in the text that has the mode's key; None where there is none whole."""
    name, decoder = KEYS[mode], json.JSONDecoder()
    for brace in reversed([match.start() for match in re.finditer(r"\{", said)]):
        try:
            found, _ = decoder.raw_decode(said, brace)
        except (ValueError, RecursionError):
            continue
        if name in found:
            break
    else:
        return None
    value = found[name]
    if mode == "pair":
        match = ALONE.fullmatch(value) if isinstance(value, str) else None
        value = _letter(match["value"]) if match else None
    elif mode == "grade":
        value = value if type(value) is int and 0 <= value <= HIGHEST_GRADE else None
    else:
        items = value if isinstance(value, list) else []
        value = _places([item for item in items if type(item) is int], count)
    if value is None:
        return UNPARSED
    stated = found.get("confidence", found.get("confidence_score"))
    confidence = _confidence(f"confidence: {stated}") if stated is not None else None
    opening = re.compile(rf'"{name}"\s*:\s*{MARKS}{NOUN}', re.IGNORECASE).search(said, brace)
    return Verdict(value, confidence, opening.end() if opening else None)


def _spans(mode: Mode, said: str, count: int) -> Iterator[tuple[Any, int]]:
    """Every verdict in a text that is no JSON, and where it stands."""
    if mode == "pair":
        found = [*PREFERRED.finditer(said), *BRACKETED.finditer(said)]
        for match in found or filter(None, [ALONE.fullmatch(said)]):
            yield _letter(match["value"]), match.start("value")
    elif mode == "grade":
        for match in [*GRADE.finditer(said)] or filter(None, [ONLY_GRADE.fullmatch(said)]):
            yield int(match["value"]), match.start("value")
    else:
        lines = [(match["value"], match.start("value")) for match in RANKING.finditer(said)]
        for text, place in lines or ([(said, 0)] if ONLY_NUMBERS.fullmatch(said) else []):
            digits = re.findall(r"\d+", text)  # int() refuses more than some thousand of them
            numbers = [int(each) if len(each) < 10 else 0 for each in digits]
            places = _places(numbers, count)
            if places is not None:
                yield places, place


def _places(numbers: Iterable[int], count: int) -> tuple[int, ...] | None:
    """From 0, if all of 1 to `count` are there once."""
    places = tuple(number - 1 for number in numbers)
    return places if sorted(places) == list(range(count)) else None


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
    numbers = f"the numbers 1 to {count}, each once, the best first"
    kinds: dict[str, dict[str, Any]] = {
        "pair": {"type": "string", "enum": ["A", "B", "tie"]},
        "grade": {"type": "integer", "enum": [*range(HIGHEST_GRADE + 1)]},
        "list": {"type": "array", "items": {"type": "integer"}, "description": numbers},
    }
    first = "assessment" if mode == "grade" else "comparison"
    properties = {first: reasons, KEYS[mode]: kinds[mode], "confidence": {"type": "integer"}}
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


def probability(
    place: int, tokens: Sequence[dict[str, Any]], choices: Sequence[str]
) -> float | None:
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
