"""`rankpo-fast merge`: weights between a base and what was tuned from it, or of several models."""

from rankpo_fast.config import MergeConfig
from rankpo_fast.model.merge import merge


def run(config: MergeConfig) -> None:
    """Raises InputError for models that do not go together; nothing is written then."""
    for directory in merge(config):
        print(f"model saved in {directory}")
