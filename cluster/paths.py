"""Local paths as people write them, and where things are kept that can be made again."""

import os
from pathlib import Path

from cluster.errors import InputError


def local_path(text: str) -> Path:
    """The path, with `~` and `~name` filled in.

    Raises:
        InputError: nobody on this machine has that name, or the user has no home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text}: nobody here has this home directory", "Write the whole path.") from error


def is_there(path: Path) -> bool:
    """Whether there is something at a path; not at one that is too long to be any."""
    try:
        return path.exists()
    except OSError:
        return False


def cache_directory() -> Path:
    """Where this user's converted models and known digests are kept; it may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "karikomi"
