"""Garbage in the store: what is no release's and no unfinished run's, found first and removed only when asked.

What goes, each only when it is older than a limit by the store's own clock:

- in a release's directory: files that no manifest of a version names – of publishers that died, or that lost a race;
- of a run: its tensors (blocks, scores, windows, files made for the release), as the rule about runs allows. Its small
  records stay: job, attempts, events, logs, and the records of its steps;
- temporary files and uploads in parts that nobody completed.

Never: what a version, `latest` or an alias names. Where one of these cannot be read, its whole release stays.

Beside a publisher at work: a release's directory is left alone while anything in it is younger than the limit, and a
publisher writes there before it relies on anything old (`workflows.publishing`). To remove something, the collector
first claims the directory by a small object of its own, then looks again at pointers, aliases and ages, and removes
only what is still garbage. A publisher looks for the claim after its first write. So either the collector sees that
write and leaves the directory alone, or the publisher sees the claim and waits. Two collectors: the second one finds
the claim and passes on, unless its time is over and its owner must be dead.

Beside a run: the rule is asked again right before. A finished run keeps all records of its steps, so that running it
again still finds everything done. When a run may still be gone on with, the records of steps whose results name what
goes are set aside first, to runs/<run>/collected/: it then does those steps again, to the same bytes. A run that
starts in this very moment may fail once on a missing object; the next attempt goes on.
"""

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict

from cluster.errors import InputError
from cluster.storage import Entry, Leftover, MissingKey, Store
from workflows.aliases import list_aliases
from workflows.catalogue import list_names_ever, list_pointers
from workflows.publishing import collector_at_work
from workflows.release import collector_key, read_manifest, release_directory

log = structlog.get_logger()
CLAIM_HOLDS = timedelta(minutes=30)  # then nobody respects it any more,
CLAIM_USED = timedelta(minutes=15)  # and its owner stopped long before
RUN_TENSORS = ("blocks", "scores", "data", "release")  # folders of a run whose content can be made again
COLLECTED = "collected"

RunFate = Literal["keep", "finished", "idle"]
RunRule = Callable[[str], RunFate]
"""What may become of a run: "finished" – nothing will go on with it; "idle" – nobody works on it now; "keep"."""


class Garbage(BaseModel):
    """What would go, as one line: all of one kind in one place.

    Attributes:
        kind: "release" (a whole directory), "release files", "run", "leftover".
        place: key of the directory, the run, or the leftover.
        why: in words.
        objects: how many.
        size: bytes; None where the store does not tell.
        removed: it is gone now.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["release", "release files", "run", "leftover"]
    place: str
    why: str
    objects: int
    size: int | None
    removed: bool = False


def collect(store: Store, older_than: timedelta, rule: RunRule, remove: bool) -> Iterator[Garbage]:
    """Finds garbage, and removes it if asked; one entry for each piece, as it is dealt with.

    Args:
        store: the whole store of a tenant: runs and models.
        older_than: the limit of age. Longer than any publisher takes from its first write to its commit.
        rule: what may become of each run.
        remove: remove, else only tell.

    Raises:
        InputError: the limit is negative.
    """
    if older_than < timedelta(0):
        raise InputError(f"--older-than: {older_than} is no age")
    for name in list_names_ever(store):
        yield from _releases(store, name, older_than, remove)
    for run in store.folders("runs/"):
        yield from _run(store, run, older_than, rule, remove)
    before = store.clock() - older_than
    for leftover in store.leftovers():
        if leftover.began <= before:
            yield _leftover(store, leftover, remove)


def _releases(store: Store, name: str, older_than: timedelta, remove: bool) -> Iterator[Garbage]:
    """The directories of a name, one by one."""
    now, root = store.clock(), f"models/{name}/"
    entries = [entry for entry in store.entries(root) if _is_digest(entry.key.split("/")[2])]
    named = _named(store, name)
    if named is None:
        return
    for directory, group in groupby(entries, key=lambda entry: entry.key.split("/")[2]):
        found = _unnamed(list(group), named, now - older_than)
        if not found:
            continue
        if remove:
            found = _remove_unnamed(store, name, directory, older_than)
        if found:
            whole = not any(key.startswith(f"{root}{directory}/") for key in named)
            yield Garbage(
                kind="release" if whole else "release files",
                place=f"{root}{directory}",
                why="no version or alias names it" if whole else "no version's manifest names them",
                objects=len(found),
                size=sum(entry.size for entry in found),
                removed=remove,
            )


def _remove_unnamed(store: Store, name: str, directory: str, older_than: timedelta) -> list[Entry]:
    """Claims a directory, looks again, and removes what is still garbage; gives back what is gone."""
    gone: list[Entry] = []
    with _claimed(store, name, directory) as mine:
        if not mine:
            return gone
        began = store.clock()
        entries = list(store.entries(f"models/{name}/{directory}/"))  # before the pointers are read: see `_unnamed`
        named = _named(store, name)
        for entry in [] if named is None else _unnamed(entries, named, began - older_than):
            if store.clock() - began > CLAIM_USED:
                break
            store.delete(entry.key)
            gone.append(entry)
    return gone


def _unnamed(entries: list[Entry], named: set[str], before: datetime) -> list[Entry]:
    """The garbage of one directory: all that nothing names, if none of that is younger than the limit.

    Entries must have been listed before the names were read: what a publisher commits in between is named, then.
    """
    unnamed = [entry for entry in entries if entry.key not in named]
    return [] if any(entry.modified > before for entry in unnamed) else unnamed


def _named(store: Store, name: str) -> set[str] | None:
    """Every key that versions and `latest` of a name stand for; None: this cannot be told, leave all of it alone."""
    try:
        pointers = list_pointers(store, name)
        named = set()
        for pointer in pointers:
            root = release_directory(name, pointer.digest)
            files = read_manifest(store, pointer).files.values()
            named |= {f"{root}/{one.key}" for one in (*files, pointer.manifest)}
        for alias in list_aliases(store, name).values():
            if not any(pointer.digest == alias.now.digest for pointer in pointers):
                raise InputError(f"{name}@{alias.alias} names {alias.now.to}, which no version holds any more")
    except InputError as error:
        log.warning("left alone, since not all of it can be read", release=name, error=error.message)
        return None
    return named


def _is_digest(part: str) -> bool:
    """Whether a part of a key can be a release's directory: 12 hexadecimal digits."""
    return len(part) == 12 and all(letter in "0123456789abcdef" for letter in part)


@contextmanager
def _claimed(store: Store, name: str, directory: str) -> Iterator[bool]:
    """Holds a release's directory against publishers and other collectors; False when another one holds it."""
    key = collector_key(name, directory)
    mine = json.dumps({"nonce": secrets.token_hex(16), "until": (store.clock() + CLAIM_HOLDS).isoformat()}).encode()
    if not store.create(key, mine):
        found = store.get_tagged(key)
        if found is None or collector_at_work(store, found[0]) or not store.swap(key, mine, found[1]):
            yield False
            return
    try:
        yield True
    finally:
        store.delete(key)


def _run(store: Store, run: str, older_than: timedelta, rule: RunRule, remove: bool) -> Iterator[Garbage]:
    """A run's tensors."""
    fate = rule(run)
    if fate == "keep":
        return
    now = store.clock()
    entries = [entry for folder in RUN_TENSORS for entry in store.entries(f"runs/{run}/{folder}/")]
    if not entries or (fate == "idle" and max(one.modified for one in entries) > now - older_than):
        return
    garbage = Garbage(
        kind="run",
        place=f"runs/{run}",
        why="the run is over" if fate == "finished" else "nobody works on the run",
        objects=len(entries),
        size=sum(one.size for one in entries),
    )
    if not remove:
        yield garbage
        return
    if rule(run) != fate:  # somebody took it up while we looked
        return
    if fate == "idle":
        _set_aside(store, run, {entry.key for entry in entries})
    for entry in sorted(entries, key=lambda entry: not entry.key.endswith(".json")):  # records of blocks first
        store.delete(entry.key)
    yield garbage.model_copy(update={"removed": True})


def _set_aside(store: Store, run: str, going: set[str]) -> None:
    """Takes records of steps whose results go out of the journal, so that a later attempt does these again."""
    for key in list(store.keys(f"runs/{run}/steps/")):
        try:
            record = store.get_json(key)
        except (MissingKey, ValueError):
            continue
        if going & set(_texts(record.get("result"))):
            store.copy(key, f"runs/{run}/{COLLECTED}/{key.rpartition('/')[2]}")
            store.delete(key)


def _texts(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _leftover(store: Store, leftover: Leftover, remove: bool) -> Garbage:
    if remove:
        store.drop(leftover)
    return Garbage(
        kind="leftover",
        place=leftover.key,
        why=f"a write that was cut off on {leftover.began.astimezone(UTC):%Y-%m-%d}",
        objects=1,
        size=leftover.size,
        removed=remove,
    )
