"""What is published: names, versions, and aliases that people move by hand, with all their history.

    models/<name>/versions/<v>.json     a version, made once (`workflows.publishing`)
    models/<name>/latest.json           moved by publishing alone
    models/<name>/aliases/<alias>.json  every move of the alias, in order; its last one tells where it is now

An alias is replaced by compare-and-swap together with its history, so no move is ever lost or unexplained. A name is
either a version or an alias, never both: publishing refuses a version that an alias has, an alias none that a version
has, and numbers and `latest` belong to publishing. Should two that raced have got past this, the version wins.
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import InputError, Unavailable
from cluster.storage import MissingKey, Store, Stored
from workflows.publishing import (
    LATEST,
    SWAP_TRIES,
    VERSION_NAME,
    Manifest,
    Pointer,
    alias_key,
    check_name,
    find_version,
    read_manifest,
    release_directory,
)
from workflows.signing import SIGNATURE, PublicKey

REPORT = "REPORT.json"


class Move(BaseModel):
    """One move of an alias."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    kind: Literal["promote", "rollback"]
    before: str | None = Field(alias="from", description="The version that it named; None at its first move.")
    to: str
    digest: str
    by: str
    at: datetime
    reason: str


class Alias(BaseModel):
    """A name that stands for a version, as long as nobody moves it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    alias: str
    history: tuple[Move, ...] = Field(min_length=1)

    @property
    def now(self) -> Move:
        """The move that put it where it is."""
        return self.history[-1]

    @property
    def path(self) -> list[str]:
        """The versions that it was promoted to, those rolled back taken away; the last is the one it names."""
        versions: list[str] = []
        for move in self.history:
            if move.kind == "promote":
                versions.append(move.to)
            else:
                versions.pop()
        return versions


class ReportNumbers(BaseModel):
    """What of a release's REPORT.json the catalogue shows; increases are shares (0.1 is 10 %)."""

    model_config = ConfigDict(frozen=True)

    pattern: str
    stage: int
    stages: int
    parameters: int
    dense_parameters: int
    increase: float | None
    worst_slice: str | None
    worst_increase: float | None
    gate: str


class Version(BaseModel):
    """A version with all that is told of it."""

    model_config = ConfigDict(frozen=True)

    pointer: Pointer
    aliases: tuple[str, ...]
    size: int
    signed: bool
    numbers: ReportNumbers | None  # None: released without a report, or by code that wrote another one


class Verified(BaseModel):
    """A release all of whose files are what its manifest says."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    digest: str
    files: int
    size: int
    signed: bool  # by the key that was asked for


def list_names(store: Store) -> list[str]:
    """Names under which something is published."""
    return [name for name in list_names_ever(store) if _versions(store, name)]


def list_names_ever(store: Store) -> list[str]:
    """Names under which anything lies, published or left by a publisher that died."""
    return [name for name in store.folders("models/") if re.fullmatch(VERSION_NAME, name)]


def list_pointers(store: Store, name: str) -> list[Pointer]:
    """Every pointer of a name: its versions, and `latest`.

    Raises:
        InputError: one of them cannot be read.
    """
    pointers = [_existing(store, name, version) for version in _versions(store, name)]
    latest = find_version(store, name, None)
    return pointers if latest is None else [*pointers, latest]


def list_versions(store: Store, name: str) -> list[Version]:
    """A name's versions: numbers in their order, then names by the time of their commit.

    Raises:
        InputError: nothing is published under this name; a pointer or manifest is not what it was.
    """
    pointers = [_existing(store, name, version) for version in _versions(store, name)]
    if not pointers:
        raise InputError(f"{store.uri}: no release {name}", "`karikomi models` lists what there is.")
    aliases = list_aliases(store, name)
    pointers.sort(key=lambda one: (0, int(one.version), "") if one.version.isdigit() else (1, 0, one.created))
    return [_described(store, pointer, aliases) for pointer in pointers]


def latest_version(store: Store, name: str) -> Version | None:
    """The version that `latest` names, with the aliases that name it, too."""
    pointer = find_version(store, name, None)
    return None if pointer is None else _described(store, pointer, list_aliases(store, name))


def list_aliases(store: Store, name: str) -> dict[str, Alias]:
    """All aliases of a name."""
    check_name(name)
    found = {}
    for key in store.keys(f"models/{name}/aliases/"):
        alias = key.rpartition("/")[2].removesuffix(".json")
        read = find_alias(store, name, alias)
        if read is not None:
            found[alias] = read
    return found


def find_alias(store: Store, name: str, alias: str) -> Alias | None:
    """An alias with its history; None when there is none."""
    found = _tagged(store, name, alias)
    return found[0] if found else None


def resolve(store: Store, name: str, which: str | None) -> Pointer:
    """The version that NAME, NAME@VERSION or NAME@ALIAS means.

    Raises:
        InputError: there is no such one; the message lists what there is.
    """
    pointer = find_version(store, name, None if which in (None, LATEST) else which)
    if pointer is not None:
        return pointer
    alias = find_alias(store, name, which) if which not in (None, LATEST) else None
    if alias is not None:
        return _named(store, alias)
    versions = _versions(store, name)
    if not versions:
        raise InputError(f"{store.uri}: no release {name}", "`karikomi models` lists what there is.")
    there = ", ".join([*versions, *(f"{one} (alias)" for one in list_aliases(store, name))])
    raise InputError(f"{store.uri}: no release {name}@{which}", f"There are: {there}.")


def verify_release(store: Store, pointer: Pointer, key: PublicKey | None = None) -> Verified:
    """Checks a release where it lies: manifest, every file, and the signature if a key is given.

    Raises:
        InputError: something is gone or changed; names every such file.
    """
    manifest = read_manifest(store, pointer)
    root = release_directory(pointer.name, pointer.digest)
    which = f"{store.uri}: {pointer.name}@{pointer.version}"
    wrong = [
        file
        for file, stored in sorted(manifest.files.items())
        if not store.verify(stored.model_copy(update={"key": f"{root}/{stored.key}"}))
    ]
    if wrong:
        raise InputError(f"{which}: gone, or not what was published: {', '.join(wrong)}", "Publish it again.")
    if key is not None:
        if SIGNATURE not in manifest.files:
            raise InputError(f"{which} carries no signature", "Verify it without a key, or publish it signed.")
        signature = store.get(f"{root}/{manifest.files[SIGNATURE].key}")
        key.check(signature, {file: one.sha256 for file, one in model_files(manifest).items()}, which)
    return Verified(
        name=pointer.name,
        version=pointer.version,
        digest=pointer.digest,
        files=len(manifest.files),
        size=sum(one.size for one in manifest.files.values()),
        signed=key is not None,
    )


def promote(
    store: Store, name: str, version: str, alias: str, by: str, reason: str, key: PublicKey | None = None
) -> Alias:
    """Makes an alias name a version, after that version has been verified where it lies.

    Args:
        store: where both are.
        name: the release's name.
        version: a version; not another alias, so that the history says what was meant.
        alias: made if there is none.
        by: who asks.
        reason: why, for the history.
        key: whose signature the release must carry, if any.

    Raises:
        InputError: no such version, it is damaged or unsigned, or the alias cannot have this name.
        Unavailable: others keep moving it.
    """
    _check_alias(store, name, alias)
    pointer = _existing(store, name, version)
    verify_release(store, pointer, key)
    for _ in range(SWAP_TRIES):
        found = _tagged(store, name, alias)
        if found and found[0].now.to == version:
            return found[0]
        if (moved := _move(store, name, alias, found, "promote", pointer, by, reason)) is not None:
            return moved
    raise Unavailable(f"{store.uri}: {alias_key(name, alias)} keeps changing", "Run the same command again.")


def rollback(store: Store, name: str, alias: str, by: str, reason: str) -> Alias:
    """Puts an alias back to the version that it named before; again, to the one before that.

    Raises:
        InputError: no such alias, it never named another version, or that one is damaged.
        Unavailable: somebody else moved it meanwhile, so that "before" is no longer what it was.
    """
    found = _tagged(store, name, alias)
    if found is None:
        there = ", ".join(list_aliases(store, name)) or "none"
        raise InputError(f"{store.uri}: {name} has no alias {alias}", f"There are: {there}.")
    path = found[0].path
    if len(path) < 2:
        raise InputError(
            f"{store.uri}: {name}@{alias} named no other version before {path[-1]}",
            f"Move it with `karikomi promote {name}@VERSION {alias}`.",
        )
    pointer = _existing(store, name, path[-2])
    verify_release(store, pointer)
    moved = _move(store, name, alias, found, "rollback", pointer, by, reason)
    if moved is None:
        raise Unavailable(f"{store.uri}: somebody else moved {name}@{alias} just now", "Look where it is, then decide.")
    return moved


def model_files(manifest: Manifest) -> Mapping[str, Stored]:
    """The files that make the model: all but the documents, which lie under other names than their own."""
    return {file: stored for file, stored in manifest.files.items() if stored.key == file}


def _move(
    store: Store,
    name: str,
    alias: str,
    found: tuple[Alias, str] | None,
    kind: Literal["promote", "rollback"],
    pointer: Pointer,
    by: str,
    reason: str,
) -> Alias | None:
    """Moves an alias if it is still as it was found; None when it is not."""
    past = found[0].history if found else ()
    move = Move(
        kind=kind,
        before=past[-1].to if past else None,
        to=pointer.version,
        digest=pointer.digest,
        by=by,
        at=datetime.now(UTC),
        reason=reason,
    )
    moved = Alias(name=name, alias=alias, history=(*past, move))
    text = moved.model_dump_json(indent=1, by_alias=True).encode()
    return moved if store.swap(alias_key(name, alias), text, found[1] if found else None) else None


def _tagged(store: Store, name: str, alias: str) -> tuple[Alias, str] | None:
    """An alias, and the tag under which it may be replaced.

    Raises:
        InputError: what is there is no alias, or another one's.
    """
    check_name(name)
    check_name(alias)
    key = alias_key(name, alias)
    found = store.get_tagged(key)
    if found is None:
        return None
    try:
        read = Alias.model_validate_json(found[0])
        consistent = read.path[-1] == read.now.to
    except (ValidationError, IndexError) as error:
        raise InputError(f"{store.uri}: {key} is no alias: {error}") from error
    if (read.name, read.alias) != (name, alias) or not consistent:
        raise InputError(f"{store.uri}: {key} is not the history of {name}@{alias}; it was put there")
    return read, found[1]


def _named(store: Store, alias: Alias) -> Pointer:
    """The version that an alias names, if it still is the one that was promoted."""
    pointer = _existing(store, alias.name, alias.now.to)
    if pointer.digest != alias.now.digest:
        raise InputError(
            f"{store.uri}: {alias.name}@{alias.now.to} is another model than {alias.alias} was moved to",
            "Somebody replaced the version's pointer by hand; promote what is meant.",
        )
    return pointer


def _existing(store: Store, name: str, version: str) -> Pointer:
    pointer = find_version(store, name, version)
    if pointer is None:
        raise InputError(f"{store.uri}: no version {name}@{version}", f"`karikomi versions {name}` lists them.")
    return pointer


def _check_alias(store: Store, name: str, alias: str) -> None:
    """Aliases are words that no version has.

    Raises:
        InputError: this one cannot be one.
    """
    if not re.fullmatch(VERSION_NAME, alias) or alias.isdigit() or alias in (LATEST, "auto"):
        raise InputError(
            f"{alias!r} cannot be an alias: numbers, `auto` and `{LATEST}` belong to publishing",
            "Choose a word such as stable.",
        )
    if find_version(store, name, alias) is not None:
        raise InputError(f"{store.uri}: {name}@{alias} is a version", "Choose another word for the alias.")


def _versions(store: Store, name: str) -> list[str]:
    check_name(name)
    keys = store.keys(f"models/{name}/versions/")
    return [key.rpartition("/")[2].removesuffix(".json") for key in keys]


def _described(store: Store, pointer: Pointer, aliases: Mapping[str, Alias]) -> Version:
    manifest = read_manifest(store, pointer)
    return Version(
        pointer=pointer,
        aliases=tuple(alias for alias, one in aliases.items() if one.now.to == pointer.version),
        size=sum(one.size for one in manifest.files.values()),
        signed=SIGNATURE in manifest.files,
        numbers=_report_numbers(store, pointer, manifest),
    )


def _report_numbers(store: Store, pointer: Pointer, manifest: Manifest) -> ReportNumbers | None:
    """The numbers of a release's report, read as plain JSON: reports of other versions of this code have them, too."""
    if REPORT not in manifest.files:
        return None
    key = f"{release_directory(pointer.name, pointer.digest)}/{manifest.files[REPORT].key}"
    try:
        report = json.loads(store.get(key))
        verdict = report["history"][report["stage"] - 1]["verdict"]
        return ReportNumbers(
            pattern=report["pattern"],
            stage=report["stage"],
            stages=report["stages"],
            parameters=report["compressed_size"]["parameters"],
            dense_parameters=report["dense_size"]["parameters"],
            increase=verdict["increase"],
            worst_slice=verdict["worst_slice"],
            worst_increase=verdict["worst_increase"],
            gate="; ".join(verdict["reasons"]),
        )
    except (MissingKey, ValueError, LookupError, TypeError):
        return None
