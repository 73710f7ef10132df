"""`run-due`: what is due is claimed, decided and started, by any number of callers at once.

It keeps nothing in memory and may be cut off anywhere. A fire is claimed by creating its record, so it has one
winner; before a run starts, its attempt is written into that record by compare-and-swap, so whoever was taken for
dead and is not finds out there and starts nothing. What one call leaves open the next one goes on with: a claim
whose holder died, a run that waits for another one, an attempt that was lost.
"""

from collections.abc import Iterator

from cluster.errors import Cancelled, KarikomiError
from cluster.storage import Store
from jobs import fires
from jobs.edges import Edges
from jobs.fire_ends import Told
from jobs.firing import Holder
from jobs.new_fires import new_fires
from jobs.overlap import open_fires


def run_due(store: Store, edges: Edges, only: str | None = None) -> Iterator[Told]:
    """Starts what is due, of all schedules in a store or of one, and tells what came of each fire.

    A schedule that cannot be looked at does not keep the others from running; an error that ends a run is told, too.

    Raises:
        Cancelled: the user stopped it.
    """
    for name in [only] if only else fires.schedule_names(store):
        try:
            yield from turn(store, name, edges)
        except Cancelled:
            raise
        except KarikomiError as error:
            yield Told(schedule=name, fire="", what="error", sentence=str(error), code=error.exit_code)


def turn(store: Store, name: str, edges: Edges) -> Iterator[Told]:
    """Goes on with what is open of one schedule, then claims what is new."""
    holder = Holder(store, name, edges)
    applied, _ = fires.read_applied(store, name)
    for fire in open_fires(store, name):
        yield from holder.advance(applied, fire.id)
    if applied.paused:
        return
    for fire in new_fires(store, name, applied, edges):
        if holder.claim(applied.schedule.job, fire):
            yield from holder.advance(applied, fire.id)
