"""What has been published: models, versions, aliases; pull, verify; and what can be thrown away."""

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import InputError
from jobs.commands.console import StoreOption, out, say

if TYPE_CHECKING:
    from rich.table import Table

    from workflows.aliases import Alias

app = typer.Typer()
UNITS = {"h": "hours", "d": "days", "w": "weeks"}
YOUNGEST = timedelta(hours=1)  # nobody takes longer from the first write of a release to its commit

Release = Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", help="A release; the latest if only a name.")]
Alias_ = Annotated[str, typer.Argument(metavar="ALIAS", help="A word such as stable.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept in the alias's history.")]
Key = Annotated[
    Path | None, typer.Option("--key", help="PEM file of the public key whose owner must have signed the release.")
]


@app.command()
def models(store: StoreOption) -> None:
    """List what is published: one line per name, by its latest version."""
    from cluster.storage import open_store
    from workflows.aliases import list_aliases
    from workflows.catalogue import latest_version, list_names

    where = open_store(store)
    table = plain_table("name", "latest", "aliases", "size", "pattern", "quality", "date")
    for name in list_names(where):
        version = latest_version(where, name)
        if version is None:  # committed just now, `latest` follows
            continue
        aliases = [f"{alias}→{one.now.to}" for alias, one in list_aliases(where, name).items()]
        numbers = version.numbers
        table.add_row(
            name,
            version.pointer.version,
            " ".join(aliases),
            told_size(version.size),
            numbers.pattern if numbers else "",
            told_change(numbers.increase, numbers.measure) if numbers else "",
            version.pointer.created[:10],
        )
    out.print(table)


@app.command()
def versions(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A release's name.")],
    store: StoreOption,
) -> None:
    """List a name's versions with digest, run, aliases and what the gate measured; then how its aliases moved."""
    from cluster.storage import open_store
    from workflows.aliases import list_aliases
    from workflows.catalogue import list_versions

    where = open_store(store)
    found, aliases = list_versions(where, name), list_aliases(where, name)
    table = plain_table("version", "digest", "run", "aliases", "size", "signed", "date", "gate")
    for version in found:
        pointer, numbers = version.pointer, version.numbers
        table.add_row(
            pointer.version,
            pointer.digest[:12],
            pointer.run,
            " ".join(alias for alias, one in aliases.items() if one.now.to == pointer.version),
            told_size(version.size),
            "yes" if version.signed else "no",
            pointer.created[:10],
            f"stage {numbers.stage} of {numbers.stages}: {numbers.gate}" if numbers else "no report",
        )
    out.print(table)
    for alias in aliases.values():
        say_moves(alias)


@app.command()
def promote(
    release: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="A version, not another alias.")],
    alias: Alias_,
    store: StoreOption,
    reason: Reason = "",
    key: Key = None,
) -> None:
    """Make an alias name a version, once that version is verified."""
    from cluster.storage import open_store
    from jobs.records import asked_by
    from workflows.aliases import promote as move
    from workflows.signing import PublicKey

    name, _, version = release.partition("@")
    if not version:
        raise InputError(f"{release}: which version?", f"`karikomi versions {name}` lists them.")
    public = PublicKey(key) if key else None
    say_now(move(open_store(store), name, version, alias, asked_by(), reason, public))


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A release's name.")],
    alias: Alias_,
    store: StoreOption,
    reason: Reason = "",
) -> None:
    """Put an alias back to the version that it named before."""
    from cluster.storage import open_store
    from jobs.records import asked_by
    from workflows.aliases import rollback as move

    say_now(move(open_store(store), name, alias, asked_by(), reason))


@app.command()
def pull(
    release: Release,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty directory to put it in.")],
    store: StoreOption,
    key: Key = None,
) -> None:
    """Fetch a release and verify every digest; a compact one is unpacked."""
    from jobs.pulling import pull_release

    pulled = pull_release(store, release, directory, key)
    signed = f", and signed by the owner of {key}" if key else ""
    say(f"{pulled.name}@{pulled.version} is in {directory}, all {len(pulled.files)} files verified{signed}")


@app.command()
def verify(
    release: Annotated[
        str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]|DIR", help="A release in the store, or one that was pulled.")
    ],
    store: Annotated[
        str | None,
        typer.Option("--from", envvar="KARIKOMI_STORE", help="The store; with DIR, its manifest must be known there."),
    ] = None,
    key: Key = None,
) -> None:
    """Check every digest of a release, its manifest, and its signature if a key is given.

    A directory is meant when there is one that holds a MANIFEST.json.
    """
    from jobs.pulling import MANIFEST, verify_pulled, verify_stored

    if "/" in release or (Path(release) / MANIFEST).exists():
        verified, called = verify_pulled(Path(release), store, key)
    elif store is None:
        raise InputError(f"{release}: no directory of a release here, and no store given", "Give --from STORE.")
    else:
        verified, called = verify_stored(store, release, key)
    signed = f", and signed by the owner of {key}" if key else ""
    say(f"{called}: all {verified.files} files ({told_size(verified.size)}) are what was published{signed}")


@app.command()
def gc(
    store: StoreOption,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; else it is only listed.")] = False,
    older_than: Annotated[str, typer.Option(help="Nothing younger goes: a number with h, d or w.")] = "7d",
) -> None:
    """List what no release and no unfinished run needs, and how much it is; with --yes remove it.

    Leftovers of publishers that died, tensors of runs that are over, writes that were cut off. What a version or an
    alias names stays, and so do runs that live and all small records.
    """
    from cluster.storage import open_store
    from jobs.collecting import run_rule
    from workflows.collecting import collect

    where, count, total = open_store(store), 0, 0
    for garbage in collect(where, told_age(older_than), run_rule(where), yes):
        count, total = count + 1, total + (garbage.size or 0)
        size = "unknown size" if garbage.size is None else told_size(garbage.size)
        many = f"{garbage.objects} object{'s' if garbage.objects > 1 else ''}"
        say(f"{garbage.place}: {many}, {size} – {garbage.kind}: {garbage.why}")
    if not count:
        say("Nothing to remove.")
    elif yes:
        say(f"Removed {told_size(total)}.")
    else:
        say(f"{told_size(total)} can go; nothing was removed. Remove it with: karikomi gc --yes")


def say_now(alias: "Alias") -> None:
    """Where an alias is after a move."""
    now = alias.now
    say(f"{alias.name}@{alias.alias} is {now.to} ({now.digest[:12]}), before that {now.before or 'nothing'}")


def say_moves(alias: "Alias") -> None:
    """An alias's history, one line per move."""
    say(f"{alias.alias}:")
    for move in alias.history:
        reason = f" – {move.reason}" if move.reason else ""
        say(f"  {move.at:%Y-%m-%d %H:%M} {move.kind} {move.before or '–'} → {move.to} by {move.by}{reason}")


def plain_table(*columns: str) -> "Table":
    """A table without lines."""
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False)


def told_size(size: int) -> str:
    """Bytes for a person."""
    number = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def told_change(increase: float | None, measure: str) -> str:
    """How the model moved by what it was judged by."""
    from workflows.evaluation.measures import MEASURES

    return "broken" if increase is None else f"{measure} {MEASURES[measure].moved(increase)}"


def told_age(text: str) -> timedelta:
    """An age such as 7d.

    Raises:
        InputError: it is none, or so short that a publisher at work would not be told from a dead one.
    """
    found = re.fullmatch(r"([0-9]{1,4})([hdw])", text)
    if not found:
        raise InputError(f"--older-than: {text!r} is no age", "Write a number with h, d or w, such as 7d.")
    age = timedelta(**{UNITS[found[2]]: int(found[1])})
    if age < YOUNGEST:
        raise InputError("--older-than: at least 1h: a younger leftover may be a publisher at work")
    return age
