"""The documents of a release: the report in three forms, and where the model came from."""

import json
from datetime import UTC, datetime

from cluster.hardware.profiles import load_profile
from cluster.version import VERSION
from workflows.evaluation.cost import Throughput, cost
from workflows.evaluation.latency import PairedTiming
from workflows.evaluation.quality import Quality
from workflows.formats.huggingface import Formatted, dense_size
from workflows.models.source import Source
from workflows.models.state import ModelState
from workflows.recipe import Recipe
from workflows.reports.page import render_page
from workflows.reports.report import Measured, Report, StageHistory
from workflows.reports.tidy import render_parquet
from workflows.settings import RunSettings


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
    prefill, decode = (next(one for one in measured.timings if one.phase == phase) for phase in ("prefill", "decode"))
    shape = prefill.shape
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
            throughput(prefill, decode, "dense"),
            throughput(prefill, decode, "compressed"),
            settings.traffic,
            profile.price_per_hour_usd,
            f"{profile.price_source}, {profile.price_date}",
            sum(seconds.values()),
            1 if settings.cluster.address == "embedded" else settings.cluster.workers,
            f"batch {shape.batch}, {shape.prompt} prompt and {shape.new_tokens} new tokens",
        ),
        step_seconds={name: round(value, 1) for name, value in seconds.items()},
        recipe=recipe.model_dump(mode="json"),
        karikomi=VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def throughput(prefill: PairedTiming, decode: PairedTiming, model: str) -> Throughput:
    """Tokens a second of one model at the medians."""
    return Throughput(
        prefill=getattr(prefill, model).tokens_per_second, decode=getattr(decode, model).tokens_per_second
    )


def documents(report: Report) -> dict[str, bytes]:
    """File name in the release → content."""
    provenance = {
        "run": report.run,
        "model": report.model,
        "source_digest": report.source_digest,
        "model_digest": report.model_digest,
        "recipe": report.recipe,
        "karikomi": report.karikomi,
        "machine": report.measured.machine,
        "created": report.created,
    }
    return {
        "REPORT.json": (report.model_dump_json(indent=1) + "\n").encode(),
        "REPORT.parquet": render_parquet(report),
        "REPORT.html": render_page(report),
        "PROVENANCE.json": (json.dumps(provenance, indent=1) + "\n").encode(),
    }
