"""What becomes of a fire, recorded once and told to who called."""

from collections.abc import Iterator
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from cluster.errors import KarikomiError, Unavailable
from cluster.storage import Store
from jobs.endings import ending_of
from jobs.fires import Fire, FireEnded, FireResult, end_fire
from jobs.records import Attempt

ATTEMPTS = 3  # of one fire, when machines are lost


class Told(BaseModel):
    """What came of one fire, or of a schedule that could not be looked at. `code` is that of the exit contract."""

    model_config = ConfigDict(frozen=True)

    schedule: str
    fire: str
    what: str
    sentence: str
    code: int = 0


def run_ended(store: Store, fire: Fire, attempt: Attempt | None, now: datetime) -> Iterator[Told]:
    """The fire's run has ended, or was lost for good; nothing is told when another process has said so."""
    name = fire.attempts[-1]
    if attempt is not None and attempt.ended is not None:
        last = attempt.ended
        ended = FireEnded(
            at=now, result=last.result, sentence=last.sentence, code=last.code, attempt=name, release=last.release
        )
    else:
        sentence = f"run {name} was lost; that was attempt {len(fire.attempts)} of {ATTEMPTS}"
        ended = FireEnded(at=now, result="lost", sentence=sentence, code=Unavailable.exit_code, attempt=name)
    if end_fire(store, fire, ended):
        yield told(fire, ended.result, ended.sentence, ended.code)


def come_to_nothing(store: Store, fire: Fire, result: FireResult, sentence: str, now: datetime) -> Told:
    """The fire starts no run, and that is no failure."""
    end_fire(store, fire, FireEnded(at=now, result=result, sentence=sentence))
    return told(fire, result, sentence)


def not_begun(store: Store, fire: Fire, error: KarikomiError, now: datetime) -> Told:
    """The fire's run could not even begin."""
    ending = ending_of(error)
    end_fire(store, fire, FireEnded(at=now, result=ending.result, sentence=str(error), code=ending.code))
    return told(fire, ending.result, str(error), ending.code)


def told(fire: Fire, what: str, sentence: str, code: int = 0) -> Told:
    """One line for who called."""
    return Told(schedule=fire.schedule, fire=fire.id, what=what, sentence=sentence, code=code)
