"""Quality against size over the stages, and against speed, as inline SVG."""

import io
import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workflows.evaluation.measures import Measure
from workflows.evaluation.quality import Quality
from workflows.reports.report import Report

READING = {"prefill": "prefill", "classify": "one text"}
INK, ACCENT, FAILED, LINE = "#222", "#1b6e53", "#b3261e", "#bbb"


def quality_against_size_and_speed(report: Report) -> str:
    """An <svg> element of two panels that share the axis of what is judged by.

    Left, one point per stage against parameters; failed gates are red, broken stages are left out.
    Right, against the time of reading: only the dense and the published model are timed.
    """
    measure = report.measure
    figure = Figure(figsize=(9.0, 3.3), layout="constrained")
    size, speed = figure.subplots(1, 2, sharey=True)
    stages = [("dense", report.dense_size.parameters / 1e6, report.dense, INK)]
    stages += [
        (f"stage {one.stage}", one.parameters / 1e6, one.final, ACCENT if one.verdict.passed else FAILED)
        for one in report.history
        if one.final.finite
    ]
    size.plot([one[1] for one in stages], [measure.value(one[2]) or 0.0 for one in stages], color=LINE, zorder=1)
    for label, x, quality, color in stages:
        point(size, label, x, quality, color, measure)
    timing = report.measured.phases[0]
    published = f"stage {report.stage}"
    for label, one, quality, color in (
        ("dense", timing.dense, report.dense, INK),
        (published, timing.compressed, report.compressed, ACCENT),
    ):
        point(speed, label, 1000 * one.percentile(50), quality, color, measure)
    size.set_xlabel("parameters, millions (zeros counted)" if report.compressed_size.zeros else "parameters, millions")
    speed.set_xlabel(f"{READING[timing.phase]} of {timing.shape.prompt} tokens, ms (median)")
    size.set_ylabel(f"{measure.name}, 95 % interval")
    for axes in (size, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.2)
    return svg(figure)


def point(axes: Axes, label: str, x: float, quality: Quality, color: str, measure: Measure) -> None:
    """One labelled dot with its interval."""
    interval, middle = measure.interval(quality), measure.value(quality)
    assert interval is not None
    assert middle is not None
    spread = [[max(0.0, middle - interval[0])], [max(0.0, interval[1] - middle)]]
    axes.errorbar(x, middle, yerr=spread, fmt="o", color=color, capsize=3)
    axes.annotate(label, (x, middle), textcoords="offset points", xytext=(8, 6), color=color)


def svg(figure: Figure) -> str:
    """The figure as an element to stand inside HTML: no prologue, no date, no fixed size."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", text[text.index("<svg") :], count=2)
