"""What may become of each run when the store is tidied up: the rule that `workflows.collecting` is handed."""

import structlog

from cluster.errors import InputError
from cluster.storage import Store
from jobs.records import read_run
from workflows.collecting import RunFate, RunRule

log = structlog.get_logger()
OVER = ("done", "rolled back", "gate not met")  # every step is recorded; going on with it does nothing


def run_rule(store: Store) -> RunRule:
    """The rule: a run that waits or works is kept, one that came to its end is finished, any other is idle.

    An attempt that stopped telling counts as idle: whoever resumes it works from then on, and until then only age
    decides. A run whose records cannot be read is kept.
    """

    def fate(run: str) -> RunFate:
        try:
            found = read_run(store, run)
        except InputError as error:
            log.warning("kept, since its records cannot be read", run=run, error=error.message)
            return "keep"
        if found is None:
            return "idle"  # nobody wrote down an attempt: only its age tells
        state = found.state(store.clock())
        if state in ("queued", "running"):
            return "keep"
        return "finished" if state in OVER else "idle"

    return fate
