"""`run-due`: what is due is claimed, decided and started, by any number of callers at once.

It keeps nothing in memory and may be cut off anywhere. A fire is claimed by creating its record, so it has one
winner; before a run starts, its attempt is written into that record by compare-and-swap, so whoever was taken for
dead and is not finds out there and starts nothing. What one call leaves open the next one goes on with: a claim
whose holder died, a run that waits for another one, an attempt that was lost.
"""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pydantic import BaseModel, ConfigDict

from cluster.errors import Cancelled, KarikomiError, Unavailable
from cluster.storage import Store, open_store
from jobs import fires
from jobs.due import START_LEASE, due, is_alive, moments_between
from jobs.endings import ending_of
from jobs.fires import AttemptName, Fire, FireEnded, FireResult, Trigger, moment_id, moment_of
from jobs.job import Job
from jobs.records import Attempt, Started, attempt_numbers, read_attempt, read_run
from jobs.schedules import Schedule
from workflows.recipe import DataSource

CHECK_LEASE = timedelta(hours=6)  # judging a large model takes long
ATTEMPTS = 3  # of one fire, when machines are lost

Note = Callable[[Started], bool]


@dataclass(frozen=True)
class Edges:
    """What the outside world does for schedules.

    Attributes:
        clock: the time, with a time zone.
        start: starts a job for somebody, here or on a cluster. It claims an attempt in that one's name and tells of
            it; on a False, another process has taken over, and it must not go on.
        finished: says so if a run of this job would do nothing: same model, recipe and data. Else None.
        model_digest: the digest of a schedule's model; None while it is being written.
        live_verdict: whether the latest release meets the job's gates on this data, and a sentence; None when there
            is no release.
        me: who calls, for the records.
    """

    clock: Callable[[], datetime]
    start: Callable[[Job, str, Note], None]
    finished: Callable[[Job], str | None]
    model_digest: Callable[[Store, Schedule], str | None]
    live_verdict: Callable[[Job, DataSource], tuple[bool, str] | None]
    me: str


class Told(BaseModel):
    """What came of one fire, or of a schedule that could not be looked at. `code` is that of the exit contract."""

    model_config = ConfigDict(frozen=True)

    schedule: str
    fire: str
    what: str
    sentence: str
    code: int = 0


def run_due(store: Store, edges: Edges, only: str | None = None) -> Iterator[Told]:
    """Starts what is due, of all schedules in a store or of one, and tells what came of each fire.

    A schedule that cannot be looked at does not keep the others from running; an error that ends a run is told, too.

    Raises:
        Cancelled: the user stopped it.
    """
    for name in [only] if only else fires.schedule_names(store):
        try:
            yield from Turn(store, name, edges).tell()
        except Cancelled:
            raise
        except KarikomiError as error:
            yield Told(schedule=name, fire="", what="error", sentence=str(error), code=error.exit_code)


@dataclass
class Turn:
    """One look at one schedule."""

    store: Store
    name: str
    edges: Edges
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    _looked: str | KarikomiError | None = None  # what `finished` said since the last run; empty: there is work

    def tell(self) -> Iterator[Told]:
        """Goes on with what is open, then claims what is new."""
        applied, _ = fires.read_applied(self.store, self.name)
        for fire in self.open_fires():
            yield from self.advance(applied, fire.id)
        if applied.paused:
            return
        for fire in self.new_fires(applied):
            if fire.runs and fire.trigger != "gate failed" and not self.blocker(applied.schedule.job, fire):
                self.look(applied.schedule.job)
            if fires.create_fire(self.store, self.held(fire)):
                yield from self.advance(applied, fire.id)

    def new_fires(self, applied: fires.Applied) -> Iterator[Fire]:
        """What has come due and nobody has claimed, in the order in which it must be claimed.

        Moments are claimed in order of time: whatever comes before the latest claimed one has been dealt with.
        """
        schedule, now = applied.schedule, self.edges.clock()
        ids, _ = fires.fire_ids(self.store, self.name)
        if schedule.cron:
            seen = [moment_of(one) for one in ids if one[0].isdigit()]
            moments = moments_between(schedule.cron, schedule.timezone, max([applied.since, *seen]), now)
            for one in due(moments, schedule.missed, now):
                yield self.claim(moment_id(one.at), "cron", one.at, missed=one.missed, runs=one.runs)
        if schedule.when_gate_fails:
            seen = [moment_of(one.removeprefix("gate-")) for one in ids if one.startswith("gate-")]
            after = max([applied.since, *seen])
            moments = moments_between(schedule.when_gate_fails.check, schedule.timezone, after, now)
            for one in due(moments, "skip" if schedule.missed == "skip" else "once", now):  # to look twice is no use
                name = f"gate-{moment_id(one.at)}"
                yield self.claim(name, "gate failed", one.at, missed=one.missed, runs=one.runs)
        if schedule.when_model_changes:
            yield from self.model_changed(schedule)

    def model_changed(self, schedule: Schedule) -> Iterator[Fire]:
        """A fire if the model is another one than at the last fire of this kind, or was never seen.

        While a run is alive none is claimed, whatever the policy: the change is still there afterwards, and skipping
        it would lose it.
        """
        if self.blocker(schedule.job, None):
            return
        digest = self.edges.model_digest(self.store, schedule)
        seen = [one for one in fires.fire_ids(self.store, self.name)[0] if one.startswith("model-")]
        if digest is None or (seen and seen[-1].endswith(digest[:16])):
            return
        why = f"the model's digest is {digest[:12]}"
        fire = f"model-{len(seen) + 1:06d}-{digest[:16]}"
        yield self.claim(fire, "model changed", self.edges.clock(), why=why)

    def claim(
        self, fire: str, trigger: Trigger, moment: datetime, missed: int = 0, runs: bool = True, why: str = ""
    ) -> Fire:
        """A fire that this process would deal with."""
        return self.held(
            Fire(
                schedule=self.name,
                id=fire,
                trigger=trigger,
                due=moment,
                missed=missed,
                runs=runs,
                why=why,
                holder=self.nonce,
                by=self.edges.me,
                held_until=moment,
            )
        )

    def held(self, fire: Fire) -> Fire:
        """The fire, held by this process for as long as it takes to start a run or to judge a model."""
        lease = CHECK_LEASE if fire.trigger == "gate failed" and not fire.why else START_LEASE
        changes = {"holder": self.nonce, "by": self.edges.me, "held_until": self.edges.clock() + lease, "waits": False}
        return fire.model_copy(update=changes)

    def advance(self, applied: fires.Applied, fire_id: str) -> Iterator[Told]:
        """Takes a fire as far as it goes now: to a run, to an end, or to where it has to wait."""
        schedule, now = applied.schedule, self.edges.clock()
        fire, tag = fires.read_fire(self.store, self.name, fire_id)
        if fire.attempts:
            last = attempt_of(fire.attempts[-1])
            if last is not None and is_alive(last, now):
                return
            if (last is not None and last.state(now) not in ("lost", "queued")) or len(fire.attempts) >= ATTEMPTS:
                yield from self.close(fire, last)
                return
        if fire.holder != self.nonce:
            if applied.paused or (not fire.waits and now < fire.held_until):
                return  # another process is at it
            taken = self.take(schedule, fire, tag)
            if taken is None:
                return
            fire, tag = taken
        yield from self.decide(schedule, fire, tag)

    def take(self, schedule: Schedule, fire: Fire, tag: str) -> tuple[Fire, str] | None:
        """Takes over a fire that nobody deals with any more; None if it has to wait, or another one took it.

        Its last holder may have died between a run's start and the note of it: such an attempt bears the fire's
        name, and is noted now.
        """
        orphans = self.orphans(schedule.job, fire)
        if orphans:
            fires.swap_fire(self.store, fire.model_copy(update={"attempts": (*fire.attempts, *orphans)}), tag)
            return None  # the next call sees what became of them
        if fire.waits and self.blocker(schedule.job, fire):
            return None
        if fire.runs and fire.trigger != "gate failed":
            self.look(schedule.job)
        taken = self.held(fire)
        new_tag = fires.swap_fire(self.store, taken, tag)
        return None if new_tag is None else (taken, new_tag)

    def decide(self, schedule: Schedule, fire: Fire, tag: str) -> Iterator[Told]:
        """A fire that this process holds: starts its run, or says why not."""
        if not fire.runs:
            count = fire.missed + 1
            sentence = f"missed {count} moment{'s' * (count > 1)}, and the policy is to skip them"
            yield self.end(fire, "skipped", sentence)
            return
        try:
            if fire.trigger == "gate failed" and not fire.why:
                result, sentence = self.judge(schedule)
                if result != "failed":
                    yield self.end(fire, result, sentence)
                    return
                fire = fire.model_copy(update={"why": sentence})
            if blocker := self.blocker(schedule.job, fire):
                if schedule.overlap == "skip" and not fire.attempts:
                    yield self.end(fire, "skipped", f"{blocker} is still at it, and the policy is to skip")
                elif fires.swap_fire(self.store, fire.model_copy(update={"waits": True}), tag):
                    yield self.told(fire, "waits", f"until {blocker} has ended")
                return
            nothing = self.look(schedule.job)
        except Unavailable:
            raise  # the fire stays open, and a later call goes on
        except KarikomiError as error:
            yield self.failed(fire, error)
            return
        if isinstance(nothing, KarikomiError):
            yield self.failed(fire, nothing)
        elif nothing:
            yield self.end(fire, "nothing to do", f"{nothing}{f'; {fire.why}' if fire.why else ''}")
        else:
            yield from self.start(schedule, fire, tag)

    def judge(self, schedule: Schedule) -> tuple[FireResult, str]:
        """Holds the latest release against its gates; "failed" is what starts a run."""
        if schedule.when_gate_fails is None:
            return "skipped", "the schedule has no such check any more"
        verdict = self.edges.live_verdict(schedule.job, schedule.when_gate_fails.data)
        if verdict is None:
            return "nothing to do", "nothing is published yet"
        return "gate met" if verdict[0] else "failed", verdict[1]

    def look(self, job: Job) -> str | KarikomiError:
        """What `finished` says, or the error that a run would end with; empty when there is something to do.

        It reads the whole model, which takes long, so it is asked before a fire is held.

        Raises:
            Unavailable: the store or the model's place is out of reach.
        """
        if self._looked is None:
            try:
                self._looked = self.edges.finished(job) or ""
            except Unavailable:
                raise
            except KarikomiError as error:
                self._looked = error
        return self._looked

    def start(self, schedule: Schedule, fire: Fire, tag: str) -> Iterator[Told]:
        """Starts the run, once its attempt stands in the fire's record."""

        def note(started: Started) -> bool:
            mine = AttemptName(run=started.run, number=started.number, store=schedule.job.publish.to)
            noted = {"attempts": (*fire.attempts, mine), "held_until": self.edges.clock()}
            return fires.swap_fire(self.store, fire.model_copy(update=noted), tag) is not None

        self._looked = None
        try:
            self.edges.start(schedule.job, self.asker(fire), note)
        except Cancelled:
            raise  # it is in the run's records; the next call tells of it
        except Exception as error:  # whatever ended a run must not keep other schedules from theirs; it is recorded
            if fires.read_fire(self.store, self.name, fire.id)[0].attempts == fire.attempts:  # it never got that far
                if not isinstance(error, KarikomiError) or isinstance(error, Unavailable):
                    raise
                yield self.failed(fire, error)
                return
        after, _ = fires.read_fire(self.store, self.name, fire.id)
        if len(after.attempts) == len(fire.attempts):
            return  # taken over
        attempt = attempt_of(after.attempts[-1])
        if attempt is None or attempt.ended is None:
            why = f": {fire.why}" if fire.why else ""
            yield self.told(fire, "started", f"run {after.attempts[-1]} ({fire.trigger}{why})")
        elif attempt.ended.result == "lost" and len(after.attempts) < ATTEMPTS:
            yield self.told(fire, "lost", f"{attempt.ended.sentence}; a later call tries again", attempt.ended.code)
        else:
            yield from self.close(after, attempt)

    def close(self, fire: Fire, attempt: Attempt | None) -> Iterator[Told]:
        """The fire's run has ended, or was lost for good."""
        name, now = fire.attempts[-1], self.edges.clock()
        if attempt is not None and attempt.ended is not None:
            told = attempt.ended
            ended = FireEnded(
                at=now, result=told.result, sentence=told.sentence, code=told.code, attempt=name, release=told.release
            )
        else:
            sentence = f"run {name} was lost; that was attempt {len(fire.attempts)} of {ATTEMPTS}"
            ended = FireEnded(at=now, result="lost", sentence=sentence, code=Unavailable.exit_code, attempt=name)
        if fires.end_fire(self.store, fire, ended):
            yield self.told(fire, ended.result, ended.sentence, ended.code)

    def end(self, fire: Fire, result: FireResult, sentence: str) -> Told:
        """The fire comes to nothing, and that is no failure."""
        fires.end_fire(self.store, fire, FireEnded(at=self.edges.clock(), result=result, sentence=sentence))
        return self.told(fire, result, sentence)

    def failed(self, fire: Fire, error: KarikomiError) -> Told:
        """The fire's run could not even begin."""
        ending = ending_of(error)
        ended = FireEnded(at=self.edges.clock(), result=ending.result, sentence=str(error), code=ending.code)
        fires.end_fire(self.store, fire, ended)
        return self.told(fire, ended.result, ended.sentence, ended.code)

    def told(self, fire: Fire, what: str, sentence: str, code: int = 0) -> Told:
        """One line for who called."""
        return Told(schedule=self.name, fire=fire.id, what=what, sentence=sentence, code=code)

    def asker(self, fire: Fire) -> str:
        """In whose name a fire's attempts are claimed."""
        return f"schedule:{self.name} {fire.id}"

    def open_fires(self) -> list[Fire]:
        """Those that have not ended, in turn."""
        _, ids = fires.fire_ids(self.store, self.name)
        return sorted((fires.read_fire(self.store, self.name, one)[0] for one in ids), key=in_turn)

    def orphans(self, job: Job, fire: Fire) -> list[AttemptName]:
        """Attempts that were claimed in a fire's name, are not noted in it, and came to something."""
        run, now = read_run(open_store(job.publish.to), job.run), self.edges.clock()
        found = [
            AttemptName(run=job.run, number=one.started.number, store=job.publish.to)
            for one in (run.attempts if run else ())
            if one.started.by == self.asker(fire)
            and (is_alive(one, now) or one.state(now) not in ("queued", "lost", "cancelled"))
        ]
        return [one for one in found if one not in fire.attempts]

    def blocker(self, job: Job, mine: Fire | None) -> str:
        """The run or fire that this one would overlap with; empty when there is none.

        Of two fires that are both about to start, the one that is later in turn gives way.
        """
        now = self.edges.clock()
        for other in self.open_fires():
            if mine is not None and other.id == mine.id:
                continue
            if other.attempts:
                last = attempt_of(other.attempts[-1])
                if last is not None and is_alive(last, now):
                    return f"run {other.attempts[-1]}"
            elif not other.waits and now < other.held_until and (mine is None or in_turn(other) < in_turn(mine)):
                return f"fire {other.id}"
        store = open_store(job.publish.to)
        numbers = attempt_numbers(store, job.run)
        last = read_attempt(store, job.run, numbers[-1]) if numbers else None
        return f"run {last.started.attempt}" if last is not None and is_alive(last, now) else ""


def in_turn(fire: Fire) -> tuple[datetime, str]:
    """The order in which fires are dealt with."""
    return fire.due, fire.id


def attempt_of(name: AttemptName) -> Attempt | None:
    """An attempt's records; None when they are gone."""
    return read_attempt(open_store(name.store), name.run, name.number)
