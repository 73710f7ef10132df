"""Aliases: names such as `stable` that people move from version to version by hand, with all their history.

An alias is one object, models/<name>/aliases/<alias>.json, replaced by compare-and-swap together with its history, so
no move is ever lost or unexplained. A name is either a version or an alias, never both: publishing refuses a version
that an alias has, an alias none that a version has, and numbers and `latest` belong to publishing. Should two that
raced have got past this, the version wins.
"""

import re
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import InputError, Unavailable
from cluster.storage import Store
from workflows.catalogue import existing_version, version_names
from workflows.publishing import SWAP_TRIES
from workflows.release import LATEST, VERSION_NAME, Pointer, alias_key, check_name, find_version
from workflows.signing import PublicKey
from workflows.verifying import verify_release


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
    versions = version_names(store, name)
    if not versions:
        raise InputError(f"{store.uri}: no release {name}", "`karikomi models` lists what there is.")
    there = ", ".join([*versions, *(f"{one} (alias)" for one in list_aliases(store, name))])
    raise InputError(f"{store.uri}: no release {name}@{which}", f"There are: {there}.")


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
    pointer = existing_version(store, name, version)
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
    pointer = existing_version(store, name, path[-2])
    verify_release(store, pointer)
    moved = _move(store, name, alias, found, "rollback", pointer, by, reason)
    if moved is None:
        raise Unavailable(f"{store.uri}: somebody else moved {name}@{alias} just now", "Look where it is, then decide.")
    return moved


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
    pointer = existing_version(store, alias.name, alias.now.to)
    if pointer.digest != alias.now.digest:
        raise InputError(
            f"{store.uri}: {alias.name}@{alias.now.to} is another model than {alias.alias} was moved to",
            "Somebody replaced the version's pointer by hand; promote what is meant.",
        )
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
