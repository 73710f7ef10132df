"""What must hold after every fault, whatever the fault was."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import KarikomiError
from cluster.storage import Store, Stored
from workflows.publishing import pull
from workflows.release import Pointer


def verified_versions(store: Store) -> dict[str, Pointer]:
    """Every release that anybody could see now, each fetched and verified from its pointer on.

    Raises:
        Whatever a reader would meet: something half-published is visible.
    """
    pointers = {}
    for key in store.keys("models/"):
        parts = key.split("/")
        if parts[2] == "latest.json" or (parts[2] == "versions" and len(parts) == 4):
            pointer = Pointer.model_validate_json(store.get(key))
            with tempfile.TemporaryDirectory() as directory:
                which = None if parts[2] == "latest.json" else pointer.version
                pulled = pull(store, parts[1], which, Path(directory) / "release")
            assert pulled.digest == pointer.digest
            pointers["/".join(parts[1:])] = pointer
    return pointers


def clear_refusal(error: KarikomiError, words: str = "") -> None:
    """The attempt ended with a cause and a way out, and with the code that says: run it again."""
    assert error.exit_code == 75
    assert words in error.message
    assert error.hint, f"no way out is named: {error.message}"


def nothing_lost(store: Store, acknowledged: Iterable[Stored]) -> None:
    """Whatever the store said that it keeps, it keeps.

    The last word on a key counts: steps may write one key twice.
    """
    for stored in {one.key: one for one in acknowledged}.values():
        assert store.verify(stored), f"{stored.key} was acknowledged and is lost or changed"


def nothing_done_again(first: dict[str, str], now: dict[str, str]) -> None:
    """A step's record, once it is there, stays as it is: finished steps are never run again."""
    for key, tag in first.items():
        assert now.get(key) == tag, f"{key} was finished, and was done again"


def step_records(store: Store) -> dict[str, str]:
    """Records of finished steps and blocks, and what tells one writing from another."""
    records = {}
    for key in store.keys("runs/"):
        if "/steps/" in key or ("/blocks/" in key and key.endswith(".json")):
            found = store.get_tagged(key)
            assert found is not None
            mark = "" if store.uri.startswith("s3://") else str((Path(store.uri) / key).stat().st_mtime_ns)
            records[key] = f"{found[1]} {mark}"
    return records
