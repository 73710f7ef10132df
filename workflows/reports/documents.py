"""The documents of a release: the report in three forms, where the model came from, and the signature."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.hardware.profiles import load_profile
from cluster.storage import Store
from cluster.version import VERSION
from workflows.bill_of_materials import BOM, bill_of_materials
from workflows.evaluation.cost import Throughput, cost
from workflows.evaluation.latency import PairedTiming
from workflows.evaluation.quality import Quality
from workflows.formats.huggingface import Formatted, dense_size
from workflows.models.source import Source
from workflows.models.state import ModelState
from workflows.provenance import PROVENANCE, find_origin, provenance
from workflows.recipe import Recipe
from workflows.release import MANIFEST
from workflows.reports.page import render_page
from workflows.reports.report import Measured, Report, StageHistory
from workflows.reports.tidy import render_parquet
from workflows.settings import RunSettings
from workflows.signing import SIGNATURE, PrivateKey


def make_report(
    recipe: Recipe,
    settings: RunSettings,
    source: Source,
    dense: ModelState,
    dense_quality: Quality,
    history: tuple[StageHistory, ...],
    release: Formatted,
    measured: Measured,
    seconds: dict[str, float],
) -> Report:
    """Puts everything that was measured together, and counts the money."""
    profile = load_profile(settings.hardware)
    first = measured.phases[0].shape
    return Report(
        name=settings.name,
        run=settings.run,
        model=recipe.model,
        source_digest=source.digest,
        model_digest=release.digest,
        pattern=recipe.target.pattern,
        stage=sum(one.verdict.passed for one in history),
        stages=len(recipe.stages),
        dense=dense_quality,
        history=history,
        dense_size=dense_size(dense, sum(one.size for one in source.weights)),
        compressed_size=release.size,
        measured=measured,
        cost=cost(
            throughput(measured.phases, "dense"),
            throughput(measured.phases, "compressed"),
            settings.traffic,
            profile.price_per_hour_usd,
            f"{profile.price_source}, {profile.price_date}",
            sum(seconds.values()),
            1 if settings.cluster.address == "embedded" else settings.cluster.workers,
            f"batch {first.batch}, {first.prompt} "
            + (f"prompt and {first.new_tokens} new tokens" if first.new_tokens else "tokens"),
        ),
        step_seconds={name: round(value, 1) for name, value in seconds.items()},
        recipe=recipe.model_dump(mode="json"),
        karikomi=VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def throughput(phases: Sequence[PairedTiming], model: str) -> Throughput:
    """Tokens a second of one model at the medians: of its first phase, which reads, and of decoding if it does."""
    read, *written = [getattr(one, model).tokens_per_second for one in phases]
    return Throughput(prefill=read, decode=written[0] if written else None)


def documents(report: Report) -> dict[str, bytes]:
    """The report: file name in the release → content."""
    return {
        "REPORT.json": (report.model_dump_json(indent=1) + "\n").encode(),
        "REPORT.parquet": render_parquet(report),
        "REPORT.html": render_page(report),
    }


def release_documents(
    store: Store, recipe: Recipe, settings: RunSettings, source: Source, release: Formatted, report: Report
) -> dict[str, bytes]:
    """Everything that a release holds beside the model: file name → content.

    Raises:
        InputError: the key to sign with cannot be used.
    """
    made = documents(report)
    origin = find_origin(store, recipe, settings, source, report)
    made[PROVENANCE] = as_json(provenance(origin, report, release, made))
    made[BOM] = as_json(bill_of_materials(origin, report, release))
    if settings.publish.sign_with:
        digests = {file: stored.sha256 for file, stored in release.files.items()}
        key = PrivateKey(Path(settings.publish.sign_with))
        made[SIGNATURE] = key.sign(settings.name, digests, [*made, MANIFEST])
    return made


def as_json(value: dict[str, Any]) -> bytes:
    """A document as text."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
