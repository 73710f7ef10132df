"""`karikomi pull`: NAME[@VERSION] into a directory, every digest verified."""

import re
from pathlib import Path

from cluster.errors import InputError
from cluster.storage import open_store
from workflows.formats.huggingface import unpack_directory
from workflows.publishing import PulledRelease, pull

CONVERT = {"compact": unpack_directory}


def pull_release(store: str, release: str, directory: Path) -> PulledRelease:
    """Fetches a release.

    Raises:
        InputError: no such release, or the directory is not empty.
    """
    found = re.fullmatch(r"([a-z0-9][a-z0-9._-]{0,62})(?:@([A-Za-z0-9][A-Za-z0-9._-]{0,62}))?", release)
    if not found:
        raise InputError(f'"{release}" is no release; write NAME or NAME@VERSION')
    return pull(open_store(store), found[1], found[2], directory, CONVERT)
