"""The end of an attempt whose driver can no longer write it down itself: recorded, accounted, told."""

from cluster.storage import Store
from jobs import ledger
from jobs.notifying import tell_for
from jobs.records import Ended, Started, note_end


def close(store: Store, started: Started, ended: Ended, tell: bool = True) -> bool:
    """Ends an attempt in its driver's place; False when its end is recorded already: the first is believed.

    Args:
        store: the run's.
        started: the attempt.
        ended: how it ended.
        tell: whether webhooks are told; not when somebody will submit the next attempt.
    """
    if not note_end(store, started, ended):
        return False
    ledger.write_row(store, started.run)
    if tell:
        tell_for(store, started.run)
    return True
