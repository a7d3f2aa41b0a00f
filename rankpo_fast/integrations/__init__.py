"""The losses in trainers that people already use: one module for each library.

A module here imports its library at its top where it subclasses its classes. Nothing else of
rankpo_fast imports a module here, so a library is imported by whoever asks for its adapter alone.
"""

from importlib import metadata


def require(distribution: str, at_least: str, tried: str) -> None:
    """Raise ImportError unless `distribution` is installed, in version `at_least` or later.

    tried: the versions the adapter was tested with, for the message.
    """
    from packaging.version import Version

    wanted = f"rankpo-fast's adapter needs {distribution} >= {at_least} (tried with {tried})"
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"{wanted}, which is not installed: pip install '{distribution}>={at_least}'"
        ) from None
    if Version(version) < Version(at_least):
        raise ImportError(f"{wanted}, and {version} is installed: pip install -U {distribution}")
