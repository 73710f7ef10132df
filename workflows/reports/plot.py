"""Quality against size over the stages, as inline SVG."""

import io
import re

from matplotlib.figure import Figure

from workflows.reports.report import Report

INK, ACCENT, FAILED = "#222", "#1b6e53", "#b3261e"


def quality_against_size(report: Report) -> str:
    """An <svg> element: one point per stage, with the interval of its perplexity; failed gates are marked."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    points = [("dense", report.dense_size.parameters, report.dense, True)]
    points += [(f"stage {one.stage}", one.parameters, one.final, one.verdict.passed) for one in report.history]
    drawn = [(label, size / 1e6, quality, passed) for label, size, quality, passed in points if quality.finite]
    axes.plot([one[1] for one in drawn], [one[2].perplexity or 0.0 for one in drawn], color="#bbb", zorder=1)
    for label, size, quality, passed in drawn:
        interval, middle = quality.interval(), quality.perplexity
        assert interval is not None
        assert middle is not None
        color = INK if label == "dense" else ACCENT if passed else FAILED
        spread = [[max(0.0, middle - interval[0])], [max(0.0, interval[1] - middle)]]
        axes.errorbar(size, middle, yerr=spread, fmt="o", color=color, capsize=3)
        axes.annotate(label, (size, middle), textcoords="offset points", xytext=(8, 6), color=color)
    axes.set_xlabel(
        "parameters, millions" if len({one[1] for one in drawn}) > 1 else "parameters, millions (zeros counted)"
    )
    axes.set_ylabel("perplexity, 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    return re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", svg[svg.index("<svg") :], count=2)
