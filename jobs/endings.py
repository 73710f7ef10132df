"""How an attempt ended, in the words of its record."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cluster.errors import Cancelled, GateNotMet, InputError, KarikomiError, Unavailable
from jobs.records import Ended, Figures, Result
from jobs.redacting import redact
from workflows.events import by_name

if TYPE_CHECKING:  # a scheduler that only looks loads no torch
    from workflows.compress import Outcome

RESULTS: dict[type[BaseException], Result] = {
    InputError: "bad input",
    GateNotMet: "gate not met",
    Unavailable: "lost",
    Cancelled: "cancelled",
    KeyboardInterrupt: "cancelled",
}


def ending_of(what: Outcome | BaseException) -> Ended:
    """How an attempt ended, as a record; its usage is still to be filled in."""
    if isinstance(what, BaseException):
        result = next((RESULTS[kind] for kind in type(what).__mro__ if kind in RESULTS), "failed")
        code = (
            what.exit_code if isinstance(what, KarikomiError) else Cancelled.exit_code if result == "cancelled" else 1
        )
        message = redact(what.message if isinstance(what, KarikomiError) else f"{type(what).__name__}: {what}")
        hint = redact(what.hint) if isinstance(what, KarikomiError) else ""
        return Ended(at=datetime.now(UTC), code=code, result=result, sentence=message, hint=hint)
    from workflows.reports.summary import verdict

    last = what.history[-1].verdict.sentence
    figures = figures_of(what)
    if what.published is None:
        return Ended(
            at=datetime.now(UTC), code=GateNotMet.exit_code, result="gate not met", sentence=last, figures=figures
        )
    return Ended(
        at=datetime.now(UTC),
        code=0 if what.complete else GateNotMet.exit_code,
        result="done" if what.complete else "rolled back",
        sentence=verdict(what.report) if what.report else last,
        release=f"{what.published.name}@{what.published.version}",
        digest=what.published.digest,
        figures=figures,
    )


def figures_of(outcome: Outcome) -> Figures:
    """The numbers of the last stage that met its gates; of the failed one when none did."""
    passed = [one for one in outcome.history if one.verdict.passed]
    judged = (passed or outcome.history)[-1].verdict
    return Figures(
        stages=len(passed),
        sparsity=passed[-1].sparsity if passed else 0.0,
        **by_name(judged.measure, judged.increase, judged.worst_increase),
    )
