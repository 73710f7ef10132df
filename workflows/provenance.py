"""Where a release came from: an in-toto Statement with SLSA's provenance predicate, as plain JSON.

Forms: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md and https://slsa.dev/spec/v1.0/provenance.
Subjects are the model files; the build is a run; its external parameters are the recipe, its dependencies the source
model's files and the data, each by its sha256. Documents are no part of the model's digest.
"""

import hashlib
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.storage import MissingKey, Store, Stored, open_store
from cluster.version import VERSION
from workflows.data.sources import fingerprint
from workflows.formats.huggingface import Formatted
from workflows.models.source import Source
from workflows.recipe import DataSource, Recipe
from workflows.reports.report import Report
from workflows.settings import RunSettings

PROVENANCE = "PROVENANCE.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:karikomi:compress:v1"  # external parameters: `name`, `version` and `recipe` of a job file
BUILDER = "urn:karikomi:run"
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "safetensors", "numpy")  # what may change bits
LARGEST_README = 1 << 20  # bytes; the licence is at its beginning
LICENCE = re.compile(rb"^license(?:_name)?[ \t]*:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9 .+_-]{0,63}?)[\"']?[ \t]*$", re.M)


class Material(BaseModel):
    """Something that a run read, and its digest."""

    model_config = ConfigDict(frozen=True)

    name: str
    uri: str
    sha256: str


class Origin(BaseModel):
    """All that the documents tell beside the report: what was read, by which run, since when.

    Attributes:
        name, version: as the job asked; "auto" where publishing chose the number.
        config: the source's config.json.
        model: the source model's files.
        data: the text of each role: calibration, tuning, evaluation.
        licence: as the source's config or README names it; empty when neither does.
        machines: what the run was told of where it runs.
        began, ended: of the run's first step and of its report.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    config: dict[str, Any]
    model: tuple[Material, ...]
    data: tuple[Material, ...]
    licence: str
    machines: dict[str, Any]
    began: datetime
    ended: datetime


def find_origin(store: Store, recipe: Recipe, settings: RunSettings, source: Source, report: Report) -> Origin:
    """Takes the digests of what the run read; weights and data were digested before, small files are read here.

    Args:
        store: holds the run's journal, which tells when it began.
        recipe: names the data.
        settings: name, version, machines.
        source: the dense model.
        report: made last.
    """
    files, root = open_store(source.uri), _address(source.uri)
    small = [_stored(files, name) for name in ("config.json", *source.others)]
    sources: dict[str, DataSource] = {
        role: getattr(recipe.data, role) for role in ("calibration", "tuning", "evaluation")
    }
    ended = _time(report.created)
    return Origin(
        name=settings.name,
        version=settings.publish.version,
        config=source.config,
        model=tuple(
            Material(name=one.key, uri=f"{root}/{one.key}", sha256=one.sha256) for one in (*source.weights, *small)
        ),
        data=tuple(
            Material(name=role, uri=_address(one.source), sha256=fingerprint(one)) for role, one in sources.items()
        ),
        licence=licence(source.config, _readme(files)),
        machines={"hardware": settings.hardware, "cluster": settings.cluster.model_dump(mode="json")},
        began=_began(store, settings.run) or ended,
        ended=ended,
    )


def provenance(origin: Origin, report: Report, release: Formatted, byproducts: Mapping[str, bytes]) -> dict[str, Any]:
    """The statement.

    Args:
        origin: what was read.
        report: the run's report.
        release: the model files, the statement's subjects.
        byproducts: the report's files, named by their digests.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file, "digest": {"sha256": one.sha256}} for file, one in sorted(release.files.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"name": origin.name, "version": origin.version, "recipe": report.recipe},
                "internalParameters": {
                    "machines": origin.machines,
                    "measuredOn": report.measured.machine,
                    "sourceDigest": report.source_digest,
                    "modelDigest": report.model_digest,
                },
                "resolvedDependencies": [
                    *(_dependency(one, f"model/{one.name}") for one in origin.model),
                    *(_dependency(one, f"data/{one.name}") for one in origin.data),
                ],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": versions()},
                "metadata": {
                    "invocationId": report.run,
                    "startedOn": timestamp(origin.began),
                    "finishedOn": timestamp(origin.ended),
                },
                "byproducts": [
                    {"name": file, "digest": {"sha256": hashlib.sha256(content).hexdigest()}}
                    for file, content in sorted(byproducts.items())
                ],
            },
        },
    }


def licence(config: Mapping[str, Any], readme: bytes) -> str:
    """The licence that a model's config.json or its README's front matter names; empty when neither does.

    Both are other people's texts: the one line is looked for, nothing is parsed. `license: other` gives way to
    `license_name`, as model cards on the Hugging Face hub write it.
    """
    named = config.get("license")
    if isinstance(named, str) and LICENCE.fullmatch(b"license: " + named.encode()):
        return named
    front = re.match(rb"---\s*\n(.*?)\n---\s*$", readme, re.S | re.M)
    found = [one.decode() for one in LICENCE.findall(front[1])] if front else []
    return next((one for one in found if one.lower() != "other"), "")


def versions() -> dict[str, str]:
    """This code, the interpreter, and the libraries whose version may change bits."""
    found = {"karikomi": VERSION, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _dependency(material: Material, name: str) -> dict[str, Any]:
    return {"name": name, "uri": material.uri, "digest": {"sha256": material.sha256}}


def _address(place: str) -> str:
    """A place as a URI: files get file://, others have a scheme already."""
    return place if re.match(r"[a-z][a-z0-9+.-]*:", place) else Path(place).expanduser().absolute().as_uri()


def _began(store: Store, run: str) -> datetime | None:
    """When the run's first step began; None when it has no journal."""
    records = [store.get_json(key) for key in store.keys(f"runs/{run}/steps/")]
    return min((_time(one["ended"]) - timedelta(seconds=one["seconds"]) for one in records), default=None)


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        return datetime.now(UTC)


def _stored(files: Store, name: str) -> Stored:
    content = files.get(name)
    return Stored(key=name, sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def _readme(files: Store) -> bytes:
    size = files.size("README.md")
    if not size:
        return b""
    try:
        return files.read("README.md", 0, min(size, LARGEST_README))
    except MissingKey:
        return b""
