"""What the parts of rankpo-fast need beside torch, and which extra of pip brings it."""

import importlib.util

from rankpo_fast.errors import InputError

# Extra -> what it installs, by pip's name and by Python's. Not here are those whose absence is said
# where they are used, as that of what reads parquet.
EXTRAS = {
    "train": {
        "transformers": "transformers",
        "safetensors": "safetensors",
        "tqdm": "tqdm",
        "pyyaml": "yaml",
        "pytrec-eval-terrier": "pytrec_eval",
    },
    "plots": {"matplotlib": "matplotlib"},
    "label": {"ibis-framework": "ibis", "duckdb": "duckdb"},
    "spark": {"ibis-framework": "ibis", "pyspark": "pyspark"},
    "judge": {"openai": "openai", "krippendorff": "krippendorff", "choix": "choix"},
    "lora": {"peft": "peft"},
    "lowbit": {"torchao": "torchao", "bitsandbytes": "bitsandbytes"},
}


def require_extra(needed_by: str, *extras: str) -> None:
    """Raise InputError, with the command that helps, unless all that `extras` bring is there.

    Nothing is imported for it.

    Args:
        needed_by: what needs them, for the message: a command's name.
        extras: keys of EXTRAS.
    """
    lacking = {
        extra: [name for name, module in EXTRAS[extra].items() if not _can_be_imported(module)]
        for extra in extras
    }
    names = [name for missing in lacking.values() for name in missing]
    if names:
        words = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        install = ",".join(extra for extra, missing in lacking.items() if missing)
        raise InputError(f"{needed_by} needs {words}: pip install 'rankpo-fast[{install}]'")


def lacks(extra: str) -> bool:
    """Whether something of an extra is not installed."""
    return not all(map(_can_be_imported, EXTRAS[extra].values()))


def _can_be_imported(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
