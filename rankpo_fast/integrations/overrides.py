"""Methods that a subclass, or whoever sets them on an object, has put in the place of a library's.

A fused loss does in one piece what its library does by several methods that may be overridden.
Where one of them is, the library's own code runs, which calls it.
"""

import warnings
from collections.abc import Iterable
from typing import Any


def overridden(owner: type, instance: Any, names: Iterable[str]) -> list[str]:
    """Those of `names` whose method on the instance is another than the one of class `owner`."""
    kind = type(instance)
    return [
        name
        for name in names
        if hasattr(owner, name)
        and (name in instance.__dict__ or getattr(kind, name) is not getattr(owner, name))
    ]


def warn_unfused(instance: Any, names: Iterable[str], library: str) -> None:
    """Say that the library's own code runs, since some of what is fused was changed."""
    warnings.warn(
        f"{type(instance).__name__}: {', '.join(names)} is not {library}'s, so its own code runs, "
        "which stores the scores: nothing is fused",
        stacklevel=2,
    )
