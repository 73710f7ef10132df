"""What schedules leave in the store. Objects are created once or swapped, so that any number of callers agree.

    schedules/<name>/schedule.json      the schedule as it was applied, by whom and when
    schedules/<name>/fires/<id>.json    one start: created by one winner; it may be taken over from who died
    schedules/<name>/ended/<id>.json    what became of it, created once
    schedules/<name>/model.json         what the model looked like last, so that it is not read through each time

The id of a fire is its moment (20261025T010000Z), gate-<moment> for a check of the live model, or
model-<number>-<digest> for a changed one; so the same cause seen twice is the same fire.
"""

from datetime import UTC, datetime
from typing import Literal

from pydantic import Field, ValidationError

from cluster.errors import InputError
from cluster.storage import MissingKey, Store
from jobs.records import Kind, Record, Result
from jobs.schedules import Schedule

Trigger = Literal["cron", "model changed", "gate failed"]
FireResult = Result | Literal["nothing to do", "skipped", "gate met"]


class Applied(Record):
    """A schedule in force."""

    schedule: Schedule
    digest: str
    paused: bool
    by: str
    at: datetime
    since: datetime = Field(description="Moments up to here are nobody's: before it was applied, or paused.")


class AttemptName(Record):
    """An attempt that a fire started."""

    run: str
    number: int
    store: str = Field(description="Where the run's records are.")

    def __str__(self) -> str:
        return f"{self.run}-a{self.number}"


class Fire(Record):
    """One start of a schedule's job, from its claim on."""

    schedule: str
    id: str
    trigger: Trigger
    due: datetime
    missed: int = Field(0, description="Earlier moments that it makes up for.")
    runs: bool = Field(True, description="False: it only notes that moments were missed.")
    why: str = Field("", description="What was seen: the changed model, the gate that failed.")
    holder: str = Field(description="Nonce of the process that deals with it.")
    by: str
    held_until: datetime = Field(description="After that its holder is taken for dead.")
    waits: bool = Field(False, description="Queued behind a run; nobody holds it.")
    attempts: tuple[AttemptName, ...] = ()


class FireEnded(Record):
    """What became of a fire."""

    at: datetime
    result: FireResult
    sentence: str
    code: int = 0
    attempt: AttemptName | None = None
    release: str = ""


def schedule_names(store: Store) -> list[str]:
    """Names of all schedules that were applied, in order."""
    return store.folders("schedules/")


def read_applied(store: Store, name: str) -> tuple[Applied, str]:
    """A schedule in force and its tag.

    Raises:
        InputError: there is none of this name, or other code wrote it.
    """
    found = tagged(store, applied_key(name), Applied)
    if found is None:
        raise InputError(
            f"{store.uri}: no schedule {name}", "`karikomi schedule list` lists them; `schedule apply FILE` makes one."
        )
    return found


def fire_ids(store: Store, name: str) -> tuple[list[str], list[str]]:
    """Ids of all fires, and of those that have not ended, in order of their ids. Reads none of them."""
    keys = list(store.keys(f"schedules/{name}/"))
    ended = {_id(key) for key in keys if key.startswith(f"schedules/{name}/ended/")}
    fires = [_id(key) for key in keys if key.startswith(f"schedules/{name}/fires/")]
    return fires, [one for one in fires if one not in ended]


def create_fire(store: Store, fire: Fire) -> bool:
    """Claims a fire; False when somebody had."""
    return store.create(_fire_key(fire.schedule, fire.id), encoded(fire))


def read_fire(store: Store, name: str, fire: str) -> tuple[Fire, str]:
    """A fire and its tag."""
    found = tagged(store, _fire_key(name, fire), Fire)
    if found is None:
        raise MissingKey(store.uri, _fire_key(name, fire))
    return found


def swap_fire(store: Store, fire: Fire, tag: str) -> str | None:
    """Replaces a fire's record if nobody did since; the new tag, or None."""
    key = _fire_key(fire.schedule, fire.id)
    if not store.swap(key, encoded(fire), tag):
        return None
    found = tagged(store, key, Fire)
    return found[1] if found and found[0] == fire else None


def end_fire(store: Store, fire: Fire, ended: FireEnded) -> bool:
    """Records what became of a fire; the first to say so is believed."""
    return store.create(_ended_key(fire.schedule, fire.id), encoded(ended))


def read_ended(store: Store, name: str, fire: str) -> FireEnded | None:
    """What became of a fire; None while that is open."""
    found = tagged(store, _ended_key(name, fire), FireEnded)
    return found[0] if found else None


def moment_id(moment: datetime) -> str:
    """A moment as an id; ids of moments sort by time."""
    return moment.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def moment_of(fire: str) -> datetime:
    """The moment in an id."""
    return datetime.strptime(fire, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


def tagged(store: Store, key: str, kind: type[Kind]) -> tuple[Kind, str] | None:
    """A record and its tag; None when there is none.

    Raises:
        InputError: other code wrote it.
    """
    found = store.get_tagged(key)
    if found is None:
        return None
    try:
        return kind.model_validate_json(found[0]), found[1]
    except ValidationError as error:
        raise InputError(f"{store.uri}: {key} is no record of this version: {error}") from error


def encoded(record: Record) -> bytes:
    """A record as it is kept."""
    return record.model_dump_json(indent=1).encode()


def applied_key(name: str) -> str:
    """Where a schedule in force is kept."""
    return f"schedules/{name}/schedule.json"


def _id(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")


def _fire_key(name: str, fire: str) -> str:
    return f"schedules/{name}/fires/{fire}.json"


def _ended_key(name: str, fire: str) -> str:
    return f"schedules/{name}/ended/{fire}.json"
