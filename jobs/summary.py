"""What stands on the terminal at the end: one sentence, one table, and where everything is."""

from rich.console import Console
from rich.table import Table

from workflows.compress import Outcome
from workflows.reports.summary import comparison, verdict
from workflows.settings import RunSettings


def print_outcome(outcome: Outcome, settings: RunSettings, console: Console) -> None:
    """Prints a run's end."""
    if outcome.published is None or outcome.report is None:
        last = outcome.history[-1]
        console.print(
            f"Nothing was published: stage {last.stage} missed its gate: {last.verdict.sentence}.",
            highlight=False,
        )
        console.print("Loosen gates, lower target.sparsity, or give stages more tune.steps.", highlight=False)
        return
    table = Table("", "dense", "compressed", "change", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in comparison(outcome.report):
        table.add_row(*row)
    console.print(table, highlight=False)
    console.print(verdict(outcome.report), highlight=False, markup=False)
    done = outcome.published
    console.print(f"Release: {done.name}@{done.version} at {done.uri}", highlight=False, soft_wrap=True)
    console.print(
        f"Fetch it: karikomi pull {done.name}@{done.version} DIR --from {settings.publish.to} (REPORT.html is in it)",
        highlight=False,
        soft_wrap=True,
    )
