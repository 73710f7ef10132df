"""The report as one self-contained HTML page that a manager reads and an engineer can check."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from workflows.evaluation.gates import Verdict
from workflows.reports.report import Report
from workflows.reports.summary import comparison, verdict

DAYS_PER_MONTH = 30


def render_page(report: Report) -> bytes:
    """UTF-8 HTML without any outside resource; all text of users is escaped."""
    # Drawing takes a second to import, and every command that knows the workflow would pay it.
    from workflows.reports.plot import quality_against_size_and_speed

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("workflows.reports") / "page.html.j2").read_text())
    return template.render(
        report=report,
        verdict=verdict(report),
        rows=comparison(report),
        plot=quality_against_size_and_speed(report),
        payback=payback(report),
        gate_increase=gate_increase,
        shown=lambda quality: report.measure.shown(report.measure.value(quality)),
        rounds=len(report.measured.phases[0].dense.seconds),
    ).encode()


def payback(report: Report) -> str:
    """When the run has paid for itself; nothing is promised from a speed that was not measurably different."""
    ranges = [one.speedup()[1:] for one in report.measured.phases]
    if all(low <= 1 <= high for low, high in ranges):
        return "cannot be told: no speed differs measurably"
    months = report.cost.months_to_pay_back
    if months is None:
        return "never: nothing is saved"
    return "within a day" if months * DAYS_PER_MONTH < 1 else f"after {months:,.1f} months"


def gate_increase(judged: Verdict) -> str:
    """How the model moved, with the paired interval, such as "+1.6 % (-0.8 to +4.1)"; of accuracy in points."""
    if judged.increase is None or judged.interval is None:
        return "broken"
    low, high = judged.interval
    if judged.measure == "accuracy":
        return f"{-100 * judged.increase:+.1f} ({-100 * high:+.1f} to {-100 * low:+.1f})"
    return f"{100 * judged.increase:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"
