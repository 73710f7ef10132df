"""What tells that a file changed without reading it: size and time here, size and ETag on S3."""

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cluster.s3_store import S3Store
from cluster.storage import Store


class Mark(NamedTuple):
    """A file as it stands. Equal marks: the same content, unless somebody took pains to hide a change."""

    mark: str
    changed: datetime


def marks(store: Store) -> dict[str, Mark]:
    """Marks of the files directly in a store's directory or prefix; a single listing.

    Raises:
        Unavailable, InputError: as the store's own reading does.
    """
    if isinstance(store, S3Store):
        return _of_prefix(store)
    found = {}
    for path in sorted(Path(store.uri).iterdir()) if Path(store.uri).is_dir() else ():
        if path.is_file():
            stat = path.stat()
            mark = f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
            found[path.name] = Mark(mark, datetime.fromtimestamp(stat.st_mtime, UTC))
    return found


def _of_prefix(store: S3Store) -> dict[str, Mark]:
    prefix = f"{store.prefix}/" if store.prefix else ""
    with store._errors(prefix):
        listing = store._client.get_paginator("list_objects_v2")
        pages = list(listing.paginate(Bucket=store.bucket, Prefix=prefix, Delimiter="/"))
    entries = [entry for page in pages for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
    return {
        entry["Key"].removeprefix(prefix): Mark(f"{entry['Size']}-{entry['ETag']}", entry["LastModified"])
        for entry in entries
    }
