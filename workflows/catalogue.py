"""What is published: names, their versions, and what each version's report says.

models/<name>/versions/<v>.json     a version, made once (`workflows.release`)
models/<name>/latest.json           moved by publishing alone
models/<name>/aliases/<alias>.json  moved by people (`workflows.aliases`)
"""

import json
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cluster.errors import InputError
from cluster.storage import MissingKey, Store
from workflows.release import (
    VERSION_NAME,
    Manifest,
    Pointer,
    check_name,
    find_version,
    read_manifest,
    release_directory,
)
from workflows.signing import SIGNATURE

REPORT = "REPORT.json"


class ReportNumbers(BaseModel):
    """What of a release's REPORT.json the catalogue shows; increases are shares of the measure, as in its verdict."""

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
    measure: Literal["perplexity", "accuracy"] = "perplexity"


class Version(BaseModel):
    """A version with all that is told of it."""

    model_config = ConfigDict(frozen=True)

    pointer: Pointer
    size: int
    signed: bool
    numbers: ReportNumbers | None  # None: released without a report, or by code that wrote another one


def list_names(store: Store) -> list[str]:
    """Names under which something is published."""
    return [name for name in list_names_ever(store) if version_names(store, name)]


def list_names_ever(store: Store) -> list[str]:
    """Names under which anything lies, published or left by a publisher that died."""
    return [name for name in store.folders("models/") if re.fullmatch(VERSION_NAME, name)]


def list_pointers(store: Store, name: str) -> list[Pointer]:
    """Every pointer of a name: its versions, and `latest`.

    Raises:
        InputError: one of them cannot be read.
    """
    pointers = [existing_version(store, name, version) for version in version_names(store, name)]
    latest = find_version(store, name, None)
    return pointers if latest is None else [*pointers, latest]


def list_versions(store: Store, name: str) -> list[Version]:
    """A name's versions: numbers in their order, then words by the time of their commit.

    Raises:
        InputError: nothing is published under this name; a pointer or manifest is not what it was.
    """
    pointers = [existing_version(store, name, version) for version in version_names(store, name)]
    if not pointers:
        raise InputError(f"{store.uri}: no release {name}", "`karikomi models` lists what there is.")
    pointers.sort(key=lambda one: "" if one.version.isdigit() else one.created)
    return [_described(store, pointer) for pointer in pointers]


def latest_version(store: Store, name: str) -> Version | None:
    """The version that `latest` names; None when nothing is published under this name."""
    pointer = find_version(store, name, None)
    return None if pointer is None else _described(store, pointer)


def existing_version(store: Store, name: str, version: str) -> Pointer:
    """A version's pointer.

    Raises:
        InputError: there is no such version.
    """
    pointer = find_version(store, name, version)
    if pointer is None:
        raise InputError(f"{store.uri}: no version {name}@{version}", f"`karikomi versions {name}` lists them.")
    return pointer


def version_names(store: Store, name: str) -> list[str]:
    """The versions of a name, numbers first, in their order."""
    check_name(name)
    keys = store.keys(f"models/{name}/versions/")
    names = [key.rpartition("/")[2].removesuffix(".json") for key in keys]
    return sorted(names, key=lambda name: (0, int(name), "") if name.isdigit() else (1, 0, name))


def _described(store: Store, pointer: Pointer) -> Version:
    manifest = read_manifest(store, pointer)
    return Version(
        pointer=pointer,
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
            measure=verdict.get("measure", "perplexity"),
        )
    except (MissingKey, ValueError, LookupError, TypeError, AttributeError):
        return None
