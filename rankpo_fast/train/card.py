"""The model card, README.md of the output directory: what the model is, came from, and is worth.

Its head is YAML that the Hugging Face hub reads. A licence stands there only where the base names
one.
"""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rankpo_fast import __version__
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.train.run import Run

DATA = ("--train_data", "--replay_data", "--graded_data", "--teacher_data")
LIBRARIES = ("torch", "transformers")
LICENSE_KEYS = ("license", "license_name", "license_link")
USE = """\
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{path}")
queries = model.encode_query(["a query"])
passages = model.encode_document(["a passage"])
print(model.similarity(queries, passages))
```

```sh
rankpo-fast encode --model_name_or_path {path} --input passages.jsonl --output passages.npy
```

transformers loads it as `AutoModel` and `AutoTokenizer`: {recipe}.
"""
POOLED = {
    "last": "the state of the last token is the vector",
    "cls": "the state of the first token is the vector",
    "mean": "the mean of the states of all tokens is the vector",
}


def model_card(
    run: Run, encoder: Encoder, about: dict[str, str], figures: dict[str, float] | None = None
) -> str:
    """The card of what `run` made of the encoder.

    Args:
        about: what the stage says of its rows and its loss.
        figures: those of the evaluation at the end, once there was one.
    """
    from huggingface_hub import ModelCardData

    base = run.model.model_name_or_path
    license: dict[str, Any] = {}
    if not run.model.from_scratch:
        license |= base_license(encoder.origins)
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        # A directory's name would be taken for one on the hub.
        base_model=None if Path(base).expanduser().exists() else base,
        tags=["sentence-transformers", "sentence-similarity", "rankpo-fast", run.stage],
        **license,
    )
    made = "with random weights at the start, as" if run.model.from_scratch else "from"
    name = run.path.resolve().name
    sections = {
        f"# {name}": f"A text embedding model: {encoder.dim} dims, compared by cosine. Trained "
        f"{made} `{base}` by rankpo-fast, stage `{run.stage}`.",
        "## Use": USE.format(path=name, recipe=_recipe(encoder)),
        "## Data": _data(run, about),
        "## Figures": _figures(run, figures),
        "## Licence": license.get("license") and f"{license['license']}, as of `{base}`."
        or f"The files of `{base}` name none.",
        "## Settings": _table("flag", "value", {
            flag: repr(value) for flag, value in run.settings.items()
            if flag.startswith("--") and value is not None and value != []
        }),
        "## Versions": _table("package", "version", {
            "rankpo-fast": __version__, **{name: version(name) for name in LIBRARIES}
        }),
    }  # fmt: skip
    body = "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in sections.items())
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def base_license(directories: Iterable[Path]) -> dict[str, str]:
    """License, its name and link, of the first card in `directories` that has any; else {}."""
    return next(filter(None, map(_license, directories)), {})


def _license(directory: Path) -> dict[str, str]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = directory / "README.md"
    if not path.is_file():
        return {}
    try:
        head = metadata_load(path) or {}
    except (ValueError, YAMLError):  # not ours to mend: no licence can be read there
        return {}
    return {key: head[key] for key in LICENSE_KEYS if isinstance(head.get(key), str)}


def _recipe(encoder: Encoder) -> str:
    settings = encoder.settings
    prefixes = {"queries": settings.query_prefix, "passages": settings.passage_prefix}
    steps = [f"put {text!r} before {kind}" for kind, text in prefixes.items() if text]
    lengths = f"{settings.max_query_length} tokens of a query"
    steps.append(f"keep {lengths} and {settings.max_passage_length} of a passage")
    return "; ".join([*steps, POOLED[settings.pooling], "normalise it"])


def _data(run: Run, about: dict[str, str]) -> str:
    rows: dict[str, str] = {}
    for flag in DATA:
        paths = [path for given, path in run.inputs if given == flag]
        digests = run.settings.get(f"content of {flag}", [])
        rows |= {f"`{path}` ({flag})": digest for path, digest in zip(paths, digests, strict=False)}
    said = "; ".join(f"{name}: {text}" for name, text in about.items())
    return f"{said[:1].upper()}{said[1:]}.\n\n{_table('file', 'sha256', rows)}"


def _figures(run: Run, figures: dict[str, float] | None) -> str:
    if not run.evaluation.asked:
        return "Not measured: no evaluation data was given."
    if not figures:
        return "Not measured: the run was stopped before its evaluation."
    flags = ("--query_data", "--corpus_data", "--preference_data")
    on = [f"`{path}` ({flag})" for flag, path in run.inputs if flag in flags]
    values = {name: f"{value:.4f}" for name, value in figures.items()}
    return f"At the end, on {', '.join(on)}:\n\n{_table('figure', 'value', values)}"


def _table(left: str, right: str, rows: dict[str, str]) -> str:
    cells = [(left, right), ("---", "---"), *rows.items()]
    return "\n".join(f"| {a} | {str(b).replace('|', chr(92) + '|')} |" for a, b in cells)
