"""Ray's errors as ours: what was lost with machines can be done again, what the work itself raised is as it is."""

from ray.exceptions import (
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RpcError,
    RuntimeEnvSetupError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from cluster.errors import KarikomiError, Unavailable

# Processes, machines or what they held are gone; other machines can do the work again.
GONE = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RaySystemError,
    RpcError,
    RuntimeEnvSetupError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    ActorUnschedulableError,
)
FULL = (ObjectStoreFullError, OutOfDiskError)
AGAIN = "Run the same command again: it goes on where it was."


class MachinesLost(Unavailable):
    """Workers or nodes are gone, and Ray's own retries are used up; on other machines the work can go on."""


class NotWritten(Exception):
    """A worker needs a block's file, which was not there when its work was lined up."""


def cause_of(error: BaseException) -> BaseException:
    """What the work raised; Ray hands it on as the error of whatever waited for its results."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def ours(error: RayError, what: str) -> Exception:
    """What a Ray error means to the caller.

    Args:
        error: as raised by `ray.get` and its like.
        what: what was being done, for the message.

    Returns:
        An error of ours when the work raised one; `MachinesLost` when machines or processes were; `Unavailable` when
        waiting for other machines changes nothing; else the error itself, which is a fault in the code.
    """
    cause = cause_of(error)
    if isinstance(cause, KarikomiError):
        return cause
    summary = (str(cause).strip().splitlines() or [""])[0]
    if isinstance(cause, LocalRayletDiedError):
        return Unavailable(f"{what}: Ray on this machine is gone", AGAIN)
    if isinstance(cause, FULL):
        return Unavailable(
            f"{what}: Ray's object store and the disk that it spills to are full: {summary}",
            "Free disk space under Ray's temporary directory (RAY_TMPDIR), or use fewer cluster.workers per node; "
            "then run the same command again.",
        )
    if isinstance(cause, GONE):
        return MachinesLost(f"{what}: {type(cause).__name__}: {summary}", AGAIN)
    return error
