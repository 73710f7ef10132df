"""A report in words: the verdict as one sentence, and the table dense beside compressed."""

from typing import NamedTuple

from workflows.evaluation.latency import PairedTiming
from workflows.evaluation.measures import Measure
from workflows.evaluation.quality import Quality
from workflows.reports.report import Report

MIB = 1 << 20


class Row(NamedTuple):
    """One line of the comparison, ready to be shown."""

    label: str
    dense: str
    compressed: str
    change: str


def verdict(report: Report) -> str:
    """What a manager reads: smaller by how much, faster by how much, at what price in quality; and what failed."""
    size = change(report.dense_size.parameters, report.compressed_size.parameters)
    kept = report.published_stage.verdict.increase or 0.0
    parts = [
        f"{report.name}: {abs(size):.1%} fewer parameters"
        if size < 0
        else f"{report.name}: as many parameters, "
        f"{report.compressed_size.zeros / report.compressed_size.block_parameters:.0%} of the pruned matrices are zero",
        *(f"{one.phase} {faster(one)}" for one in report.measured.phases),
        report.measure.said(kept),
    ]
    sentence = ", ".join(parts) + "."
    if report.stage < report.stages:
        failed = report.history[report.stage]
        sentence += (
            f" Stage {failed.stage} of {report.stages} missed its gate ({failed.verdict.sentence}); "
            f"stage {report.stage} is published instead."
        )
    return sentence


def faster(timing: PairedTiming) -> str:
    """A speed-up with its interval; no claim where the interval holds 1."""
    middle, low, high = timing.speedup()
    if low > 1:
        return f"{middle:.2f} times as fast ({low:.2f} to {high:.2f})"
    if high < 1:
        return f"slower: {middle:.2f} times as fast ({low:.2f} to {high:.2f})"
    return f"not measurably faster ({low:.2f} to {high:.2f})"


def comparison(report: Report) -> list[Row]:
    """The table: size, quality, latency, throughput, memory, money."""
    dense, compressed = report.dense_size, report.compressed_size
    rows = [
        row("parameters", dense.parameters, compressed.parameters, "{:,.0f}"),
        row("  in blocks' linears, not zero", dense.block_parameters - dense.zeros,
            compressed.block_parameters - compressed.zeros, "{:,.0f}"),
        row("weights on disk, MiB", dense.weight_bytes / MIB, compressed.weight_bytes / MIB, "{:,.1f}"),
    ]  # fmt: skip
    if compressed.compact_bytes is not None:
        rows.append(
            row(
                "  zeros packed away, MiB",
                dense.weight_bytes / MIB,
                compressed.compact_bytes / MIB,
                "{:,.0f}",
            )
        )
    measure = report.measure
    rows.append(quality_row(measure.name, report.dense, report.compressed, measure))
    slices = report.dense.slices
    if len(slices) > 1:
        rows += [
            quality_row(f"  slice {name}", report.dense.of_slice(name), report.compressed.of_slice(name), measure)
            for name in slices
        ]
    for one, other in zip(measure.further(report.dense), measure.further(report.compressed), strict=True):
        rows.append(row(one.label, one.value, other.value, one.form))
    for timing in report.measured.timings:
        rows += timing_rows(timing)
    before, after = report.measured.dense_footprint, report.measured.compressed_footprint
    rows.append(row("peak memory, MiB", before.peak_bytes / MIB, after.peak_bytes / MIB, "{:,.0f}"))
    rows.append(row("load time, s", before.load_seconds, after.load_seconds, "{:.2f}"))
    rows.append(
        row(
            "$ per million tokens",
            report.cost.dense_per_million,
            report.cost.compressed_per_million,
            "{:.4f}",
        )
    )
    return rows


def row(label: str, dense: float, compressed: float, form: str) -> Row:
    """A row of two numbers and their relative change."""
    return Row(label, form.format(dense), form.format(compressed), f"{change(dense, compressed):+.1%}")


def quality_row(label: str, dense: Quality, compressed: Quality, measure: Measure) -> Row:
    """A row of what two models are judged by, with intervals."""
    cells = []
    for one in (dense, compressed):
        interval = measure.interval(one)
        assert interval is not None
        low, high = (measure.shown(bound) for bound in interval)
        cells.append(f"{measure.shown(measure.value(one))} ({low} to {high})")
    return Row(label, cells[0], cells[1], measure.moved(measure.worse(dense, compressed) or 0.0))


def timing_rows(timing: PairedTiming) -> list[Row]:
    """Median, tail and throughput of one phase at one shape."""
    shape = timing.shape
    decode = timing.phase == "decode"
    place = f"batch {shape.batch}" if decode else f"{shape.batch} x {shape.prompt}"
    scale = 1000.0 / shape.new_tokens if decode else 1000.0
    unit = "ms a token" if decode else "ms"
    what, each = ("texts", shape.prompt) if timing.phase == "classify" else ("tokens", 1)
    cells = [
        f"{one.percentile(50) * scale:.1f} / {one.percentile(90) * scale:.1f} / {one.percentile(99) * scale:.1f}"
        for one in (timing.dense, timing.compressed)
    ]
    return [
        Row(f"{timing.phase} {place}, p50 / p90 / p99 {unit}", cells[0], cells[1], faster(timing)),
        row(
            f"  {what} a second",
            timing.dense.tokens_per_second / each,
            timing.compressed.tokens_per_second / each,
            "{:,.1f}",
        ),
    ]


def change(before: float, after: float) -> float:
    """Relative change; 0 where there was nothing before."""
    return after / before - 1 if before else 0.0
