"""A full disk is nobody's mistake in a file or a field: it is told as such, and the same command goes on later."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import Unavailable

FULL = (errno.ENOSPC, errno.EDQUOT)
AS_TEXT = "No space left on device"  # libraries in other languages hand on the system's words, not its number


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room on a disk."""
    return getattr(error, "errno", None) in FULL or AS_TEXT in str(error)


def not_written(what: str, error: Exception) -> Unavailable:
    """A write that the file system did not take, and the way out: room, if that is what is missing."""
    if is_full(error):
        return Unavailable(
            f"{what} cannot be written: {AS_TEXT}", "Free some disk space; then run the same command again."
        )
    cause = getattr(error, "strerror", None) or error
    return Unavailable(f"{what} cannot be written: {cause}", "Run the same command again.")


@contextmanager
def room_needed(what: str) -> Iterator[None]:
    """Around what writes to a disk.

    Args:
        what: is written; for the message.

    Raises:
        Unavailable: the disk is full; any other error stays as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Unavailable) or not is_full(error):
            raise
        raise not_written(what, error) from error
