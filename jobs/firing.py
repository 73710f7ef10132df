"""One fire of a schedule, taken as far as it goes now: to a run, to an end, or to where it has to wait."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from cluster.errors import Cancelled, KarikomiError, Unavailable
from cluster.storage import Store
from jobs import fires, overlap
from jobs.due import START_LEASE, is_alive
from jobs.edges import Edges
from jobs.fire_attempts import asker, attempt_of, unnoted
from jobs.fire_ends import ATTEMPTS, Told, come_to_nothing, not_begun, run_ended, told
from jobs.fires import Applied, AttemptName, Fire, FireResult
from jobs.job import Job
from jobs.records import Started
from jobs.schedules import Schedule

CHECK_LEASE = timedelta(hours=6)  # judging a large model takes long


@dataclass
class Holder:
    """A process that deals with the fires of one schedule."""

    store: Store
    name: str
    edges: Edges
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    _looked: str | KarikomiError | None = None  # what `finished` said since the last run; empty: there is work

    def claim(self, job: Job, fire: Fire) -> bool:
        """Claims a fire that nobody holds; False when somebody had."""
        if fire.runs and fire.trigger != "gate failed" and not self.blocker(job, fire):
            self.look(job)
        return fires.create_fire(self.store, self.held(fire))

    def held(self, fire: Fire) -> Fire:
        """The fire, held by this process for as long as it takes to start a run or to judge a model."""
        lease = CHECK_LEASE if fire.trigger == "gate failed" and not fire.why else START_LEASE
        changes = {"holder": self.nonce, "by": self.edges.me, "held_until": self.edges.clock() + lease, "waits": False}
        return fire.model_copy(update=changes)

    def advance(self, applied: Applied, fire_id: str) -> Iterator[Told]:
        """Takes a fire as far as it goes now: to a run, to an end, or to where it has to wait."""
        schedule, now = applied.schedule, self.edges.clock()
        fire, tag = fires.read_fire(self.store, self.name, fire_id)
        if fire.attempts:
            last = attempt_of(fire.attempts[-1])
            if last is not None and is_alive(last, now):
                return
            if (last is not None and last.state(now) not in ("lost", "queued")) or len(fire.attempts) >= ATTEMPTS:
                yield from run_ended(self.store, fire, last, now)
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
        orphans = unnoted(schedule.job, fire, self.edges.clock())
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
            yield self.nothing(fire, "skipped", sentence)
            return
        try:
            if fire.trigger == "gate failed" and not fire.why:
                result, sentence = self.judge(schedule)
                if result != "failed":
                    yield self.nothing(fire, result, sentence)
                    return
                fire = fire.model_copy(update={"why": sentence})
            if other := self.blocker(schedule.job, fire):
                if schedule.overlap == "skip" and not fire.attempts:
                    yield self.nothing(fire, "skipped", f"{other} is still at it, and the policy is to skip")
                elif fires.swap_fire(self.store, fire.model_copy(update={"waits": True}), tag):
                    yield told(fire, "waits", f"until {other} has ended")
                return
            found = self.look(schedule.job)
        except Unavailable:
            raise  # the fire stays open, and a later call goes on
        except KarikomiError as error:
            yield not_begun(self.store, fire, error, self.edges.clock())
            return
        if isinstance(found, KarikomiError):
            yield not_begun(self.store, fire, found, self.edges.clock())
        elif found:
            yield self.nothing(fire, "nothing to do", f"{found}{f'; {fire.why}' if fire.why else ''}")
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
            self.edges.start(schedule.job, asker(fire), note)
        except Cancelled:
            raise  # it is in the run's records; the next call tells of it
        except Exception as error:  # whatever ended a run must not keep other schedules from theirs; it is recorded
            if fires.read_fire(self.store, self.name, fire.id)[0].attempts == fire.attempts:  # it never got that far
                if not isinstance(error, KarikomiError) or isinstance(error, Unavailable):
                    raise
                yield not_begun(self.store, fire, error, self.edges.clock())
                return
        after, _ = fires.read_fire(self.store, self.name, fire.id)
        if len(after.attempts) == len(fire.attempts):
            return  # taken over
        attempt = attempt_of(after.attempts[-1])
        if attempt is None or attempt.ended is None:
            why = f": {fire.why}" if fire.why else ""
            yield told(fire, "started", f"run {after.attempts[-1]} ({fire.trigger}{why})")
        elif attempt.ended.result == "lost" and len(after.attempts) < ATTEMPTS:
            yield told(fire, "lost", f"{attempt.ended.sentence}; a later call tries again", attempt.ended.code)
        else:
            yield from run_ended(self.store, after, attempt, self.edges.clock())

    def blocker(self, job: Job, fire: Fire) -> str:
        """The run or fire that it would overlap with now; empty when there is none."""
        return overlap.blocker(self.store, self.name, job, fire, self.edges.clock())

    def nothing(self, fire: Fire, result: FireResult, sentence: str) -> Told:
        """It starts no run."""
        return come_to_nothing(self.store, fire, result, sentence, self.edges.clock())
