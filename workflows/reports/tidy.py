"""The report as a Parquet table: one row per measurement, for those who compare many runs."""

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workflows.evaluation.measures import measure_of
from workflows.evaluation.quality import Quality
from workflows.reports.report import Report

COLUMNS = {
    "run": pa.string(), "stage": pa.int32(), "model": pa.string(), "metric": pa.string(), "slice": pa.string(),
    "value": pa.float64(), "low": pa.float64(), "high": pa.float64(), "unit": pa.string(),
}  # fmt: skip


def render_parquet(report: Report) -> bytes:
    """Columns: run, stage (0: dense), model, metric, slice, value, low, high (95 % interval), unit."""
    rows = [dict(zip(COLUMNS, (report.run, *values), strict=True)) for values in measurements(report)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(COLUMNS)), buffer, compression="zstd")
    return buffer.getvalue()


def measurements(report: Report) -> Iterator[tuple[Any, ...]]:
    """(stage, model, metric, slice, value, low, high, unit)."""
    yield from quality_rows(0, "dense", report.dense)
    for one in report.history:
        yield from quality_rows(one.stage, "pruned", one.pruned)
        if one.tuned:
            yield from quality_rows(one.stage, "tuned", one.tuned)
    for stage, model, size in (
        (0, "dense", report.dense_size),
        (report.stage, "compressed", report.compressed_size),
    ):
        yield stage, model, "parameters", "all", size.parameters, None, None, "1"
        yield stage, model, "weight_bytes", "all", size.weight_bytes, None, None, "B"
    for timing in report.measured.timings:
        shape = timing.shape
        label = f"batch={shape.batch} prompt={shape.prompt} new={shape.new_tokens}"
        yield report.stage, "compressed", f"{timing.phase}_speedup", label, *timing.speedup(), "1"
        for stage, model, phase in (
            (0, "dense", timing.dense),
            (report.stage, "compressed", timing.compressed),
        ):
            low, high = phase.percentile(10), phase.percentile(90)
            yield stage, model, f"{timing.phase}_seconds", label, phase.percentile(50), low, high, "s"
    yield 0, "dense", "cost_per_million_tokens", "all", report.cost.dense_per_million, None, None, "USD"
    yield (
        report.stage,
        "compressed",
        "cost_per_million_tokens",
        "all",
        report.cost.compressed_per_million,
        None,
        None,
        "USD",
    )


def quality_rows(stage: int, model: str, quality: Quality) -> Iterator[tuple[Any, ...]]:
    """What it is judged by, over all and per slice, and the numbers beside it."""
    measure = measure_of(quality)
    for name in ("all", *quality.slices):
        part = quality if name == "all" else quality.of_slice(name)
        low, high = measure.interval(part) or (None, None)
        yield stage, model, measure.name, name, measure.value(part), low, high, "1"
    for one in measure.further(quality):
        yield stage, model, one.metric, "all", one.value, None, None, "1"
