"""The end of an attempt, by its driver or in its driver's place: recorded, and accounted."""

from cluster.storage import Store
from jobs import ledger
from jobs.records import Ended, Started, note_end


def close(store: Store, started: Started, ended: Ended) -> bool:
    """Records how an attempt ended, and writes its run's row; False when an end is there already: it is believed.

    The row is written in either case: who was first may have died before it came to that.

    Raises:
        KarikomiError: the store does not take it.
    """
    first = note_end(store, started, ended)
    ledger.write_row(store, started.run)
    return first
