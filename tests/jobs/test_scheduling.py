"""Schedules at work on real stores: months of them, many callers at once, callers that die anywhere."""

import contextlib
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules_for_tests import Died, Fragile, World, schedule, utc

from cluster.errors import Cancelled, InputError, Unavailable
from cluster.storage import open_store
from jobs import fires
from jobs.due import START_LEASE, moments_between
from jobs.fires import moment_id, moment_of
from jobs.firing import CHECK_LEASE
from jobs.run_due import run_due
from jobs.scheduling import apply, change, history, list_schedules

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
BEGIN = utc("2026-10-20T00:00")
CHECK = {"data": {"source": "s3://in-house/today.parquet"}, "check": "0 2 * * *"}


@pytest.fixture(autouse=True)
def months_in_seconds(monkeypatch):
    """What is written need not outlive a loss of power here."""
    monkeypatch.setattr("cluster.directory_store._sync", lambda path: None)


@pytest.fixture
def world(tmp_path):
    return World(str(tmp_path), BEGIN)


def outcomes(world, name="weekly"):
    return {fire.id: ended.result if ended else "open" for fire, ended in history(open_store(world.to), name)}


@pytest.mark.parametrize(
    ("zone", "begin", "shifted"),
    [
        ("Europe/Berlin", "2026-09-10T00:00", 0),
        ("America/New_York", "2027-02-01T00:00", 1),
        pytest.param("America/New_York", "2026-09-10T00:00", 0, marks=pytest.mark.slow),
        pytest.param("Europe/Berlin", "2027-02-01T00:00", 1, marks=pytest.mark.slow),
    ],
)
def test_three_months_through_a_change_of_clocks(tmp_path, zone, begin, shifted):
    """Looked at in each hour at which it may start and once more a day, with downtime of two days in between."""
    world = World(str(tmp_path), utc(begin))
    world.apply(schedule(world.to, cron="30 2 * * *", timezone=zone))
    down = utc(begin) + 30 * DAY + 9 * HOUR, utc(begin) + 32 * DAY + 9 * HOUR  # not over the change itself
    midnight = utc(begin).replace(tzinfo=ZoneInfo(zone))
    for hours in range(92 * 24):
        now = (midnight.astimezone(UTC) + hours * HOUR + 31 * MINUTE).astimezone(UTC)
        if now.astimezone(ZoneInfo(zone)).hour in (1, 2, 3, 15) and not down[0] < now < down[1]:
            world.call(now)
    started = sorted(moment_of(one).astimezone(ZoneInfo(zone)) for one in world.went)
    assert set(world.went.values()) == {1}
    days = [one.date() for one in started]
    assert len(days) == len(set(days))
    missing = (days[-1] - days[0]).days + 1 - len(days)
    assert missing == 1, "of the two days of downtime the later one was made up for"
    assert Counter(one.strftime("%H:%M") for one in started) == Counter({"02:30": len(days) - shifted}) + Counter(
        {"03:00": shifted}
    )
    assert set(outcomes(world).values()) == {"done"}


@pytest.mark.parametrize(("policy", "runs", "records"), [("all", 5, 5), ("once", 1, 1), ("skip", 0, 1)])
def test_downtime_of_days(world, policy, runs, records):
    world.apply(schedule(world.to, missed=policy))
    world.call(BEGIN + 5 * DAY)
    assert world.went.total() == runs
    assert len(outcomes(world)) == records
    assert world.call(BEGIN + 5 * DAY + HOUR / 2) == []
    newest, ended = history(open_store(world.to), "weekly")[0]
    assert newest.due == utc("2026-10-24T01:00")
    if policy == "skip":
        assert ended.sentence == "missed 5 moments, and the policy is to skip them"
        world.call(utc("2026-10-25T02:05"))
        assert world.went == {"20261025T020000Z": 1}, "the next one comes in time"
    if policy == "once":
        assert newest.missed == 4


def test_overlap_is_skipped_or_queued(world):
    world.takes = 30 * HOUR
    world.apply(schedule(world.to))
    world.apply(
        schedule(world.to, name="patient", overlap="queue", job=schedule(world.to).job.model_dump() | {"name": "other"})
    )
    assert [what for _, what in world.call(utc("2026-10-20T01:00"))] == ["started", "started"]
    second = world.call(utc("2026-10-21T01:00"))
    assert [what for _, what in second] == ["waits", "skipped"]
    assert world.call(utc("2026-10-21T01:05")) == []
    world.takes = timedelta(0)
    third = world.call(utc("2026-10-21T08:00"))
    assert sorted(what for _, what in third) == ["done", "done", "done"], "both first ones, and the one that waited"
    assert outcomes(world) == {"20261020T010000Z": "done", "20261021T010000Z": "skipped"}
    assert outcomes(world, "patient") == {"20261020T010000Z": "done", "20261021T010000Z": "done"}
    assert set(world.went.values()) == {1, 2}


def test_the_same_job_by_hand_counts_as_overlap(world):
    from jobs.records import Progress, claim, note_progress

    world.apply(schedule(world.to))
    job = schedule(world.to).job
    mine = claim(open_store(world.to), job.run, job.tenant, job.name, "ann@host", "embedded", b"")
    note_progress(open_store(world.to), mine, Progress(at=utc("2026-10-20T01:00")))
    assert world.call(utc("2026-10-20T01:00")) == [("20261020T010000Z", "skipped")]


def test_nothing_to_do_is_said_and_recorded(world):
    world.apply(schedule(world.to))
    world.nothing = "same digests as before: tiny@1 stands"
    assert world.call(utc("2026-10-20T01:00")) == [("20261020T010000Z", "nothing to do")]
    assert world.went.total() == 0
    assert history(open_store(world.to), "weekly")[0][1].sentence == world.nothing


def test_a_changed_model_starts_one_run_each_time(world):
    world.apply(schedule(world.to, cron=None, when_model_changes=True))
    assert [what for _, what in world.call(BEGIN + HOUR)] == ["done"], "it has never been seen"
    assert world.call(BEGIN + 2 * HOUR) == []
    world.digest = None
    assert world.call(BEGIN + 3 * HOUR) == [], "it is being written"
    world.digest = "b" * 64
    assert [what for _, what in world.call(BEGIN + 4 * HOUR)] == ["done"]
    world.digest = "a" * 64
    assert [what for _, what in world.call(BEGIN + 5 * HOUR)] == ["done"], "what was there before is a change as well"
    assert list(world.went) == [f"model-00000{n}-{digit * 16}" for n, digit in ((1, "a"), (2, "b"), (3, "a"))]


def test_a_model_that_changes_during_a_run_waits_for_its_end(world):
    world.takes = 3 * HOUR
    world.apply(schedule(world.to, cron=None, when_model_changes=True))
    world.call(BEGIN + HOUR)
    world.digest = "b" * 64
    assert world.call(BEGIN + 2 * HOUR) == []
    assert [what for _, what in world.call(BEGIN + 5 * HOUR)] == ["done", "started"]


def test_a_failed_gate_starts_a_run_and_is_told(world):
    world.apply(schedule(world.to, cron=None, when_gate_fails=CHECK))
    steps = [
        (None, "nothing to do"),
        ((True, "perplexity rose 2 %"), "gate met"),
        ((False, "perplexity rose 80 %"), "done"),
    ]
    for day, (verdict, what) in enumerate(steps, 1):
        world.verdict = verdict
        assert [one[1] for one in world.call(BEGIN + day * DAY)] == [what]
    fire, ended = history(open_store(world.to), "weekly")[0]
    assert (fire.why, ended.release) == ("perplexity rose 80 %", "")
    assert world.went == {fire.id: 1}


def test_paused_means_nothing_starts_and_nothing_is_made_up_for(world):
    world.apply(schedule(world.to, missed="all"))
    store = open_store(world.to)
    change(store, "weekly", BEGIN, "ann", paused=True)
    assert world.call(BEGIN + 3 * DAY) == []
    assert [one.next for one in list_schedules(store, world.now)] == [None]
    _, changed = apply(store, schedule(world.to, missed="all"), world.now, "bob")
    assert not changed, "the same file leaves it paused"
    change(store, "weekly", BEGIN + 3 * DAY, "ann", paused=False)
    assert len(world.call(BEGIN + 4 * DAY)) == 1
    with pytest.raises(InputError, match="no schedule monthly"):
        change(store, "monthly", BEGIN, "ann", paused=True)


def test_apply_is_idempotent_and_changed_moments_count_from_then(world):
    store = open_store(world.to)
    first, changed = apply(store, schedule(world.to), BEGIN, "ann")
    assert (changed, first.since) == (True, BEGIN)
    assert apply(store, schedule(world.to), BEGIN + DAY, "bob") == (first, False)
    policy, changed = apply(store, schedule(world.to, missed="all"), BEGIN + DAY, "bob")
    assert (changed, policy.since, policy.by) == (True, BEGIN, "bob"), "what came due meanwhile stays due"
    earlier, _ = apply(store, schedule(world.to, cron="0 1 * * *"), BEGIN + 2 * DAY, "bob")
    assert earlier.since == BEGIN + 2 * DAY
    (listed,) = list_schedules(store, BEGIN + 2 * DAY)
    assert (listed.starts, listed.next, listed.last) == ("0 1 * * * Europe/Berlin", utc("2026-10-22T23:00"), "never")
    paused, _ = apply(store, schedule(world.to, cron="0 1 * * *", paused=True), BEGIN + 3 * DAY, "bob")
    assert paused.paused
    resumed, _ = apply(store, schedule(world.to, cron="0 1 * * *", paused=False), BEGIN + 9 * DAY, "bob")
    assert resumed.since == BEGIN + 9 * DAY


def test_errors_are_recorded_and_other_schedules_go_on(world):
    world.apply(schedule(world.to))
    world.apply(schedule(world.to, name="z-model", cron=None, when_model_changes=True))
    world.error = InputError("model: /gone is not there", "Put it back.")
    told = world.call(utc("2026-10-20T01:00"))
    assert [what for _, what in told] == ["bad input", "bad input"]
    ended = history(open_store(world.to), "weekly")[0][1]
    assert (ended.code, ended.sentence) == (2, "model: /gone is not there\nPut it back.")
    assert world.call(utc("2026-10-20T01:30")) == [], "bad input is never tried again"
    world.error = Unavailable("s3://b: out of reach")
    codes = [
        one.code
        for one in run_due(open_store(world.to), World(world.to, utc("2026-10-21T01:00"), error=world.error).edges())
    ]
    assert codes == [75]
    world.error = None
    assert world.call(utc("2026-10-21T01:05")) == [("20261021T010000Z", "done")], "a store that was away loses nothing"
    store = open_store(world.to)
    store.put("schedules/broken/schedule.json", b"{}")
    assert [(one.schedule, one.code) for one in run_due(store, world.edges())] == [("broken", 2)]


def test_a_failed_run_is_told_once_and_not_tried_again(world):
    world.result = "failed"
    world.apply(schedule(world.to))
    (told,) = run_due(open_store(world.to), World(world.to, utc("2026-10-20T01:00"), result="failed").edges())
    assert (told.what, told.code, told.sentence) == ("failed", 1, "it is failed")
    assert world.call(utc("2026-10-20T02:00")) == []


def test_a_lost_run_is_gone_on_with_and_not_for_ever(world):
    world.takes = 300 * DAY
    world.apply(schedule(world.to))
    seen = []
    for minute in range(0, 60, 5):
        world.running.clear()  # its driver was killed: no heartbeat any more
        seen += [what for _, what in world.call(utc("2026-10-20T01:00") + minute * MINUTE)]
    assert seen == ["started", "started", "started", "lost"]
    fire, ended = history(open_store(world.to), "weekly")[0]
    assert [one.number for one in fire.attempts] == [1, 2, 3]
    assert (ended.result, ended.code) == ("lost", 75)


def test_ctrl_c_ends_the_call(world):
    world.apply(schedule(world.to))
    edges = world.edges()

    def stopped(job, by, note):
        raise Cancelled("stopped")

    world.now = utc("2026-10-20T01:00")
    with pytest.raises(Cancelled):
        list(run_due(open_store(world.to), type(edges)(**{**edges.__dict__, "start": stopped})))


def test_who_was_taken_for_dead_starts_nothing(world):
    """One process stops for an hour right before its run starts; another one does the work meanwhile."""
    world.apply(schedule(world.to))
    world.now = utc("2026-10-20T01:00")
    store = open_store(world.to)
    edges = world.edges()

    def slow(job, by, note):
        assert world.call(world.now + START_LEASE + MINUTE) == [("20261020T010000Z", "done")]
        world.start(job, by, note)

    assert list(run_due(store, type(edges)(**{**edges.__dict__, "start": slow}))) == []
    assert world.went == {"20261020T010000Z": 1}


def test_a_run_that_started_before_its_note_is_found(world):
    """On a cluster the run goes on when the process that submitted it dies."""
    world.apply(schedule(world.to))
    world.takes = HOUR
    world.now = utc("2026-10-20T01:00")
    edges = world.edges()

    def submit_and_die(job, by, note):
        world.start(job, by, lambda started: True)
        raise Died

    with pytest.raises(Died):
        list(run_due(open_store(world.to), type(edges)(**{**edges.__dict__, "start": submit_and_die})))
    world.call(world.now + START_LEASE)
    assert world.call(utc("2026-10-20T02:30")) == [("20261020T010000Z", "done")]
    assert world.went == {"20261020T010000Z": 1}


def test_eight_callers_at_once(store):
    """Each moment is one fire and one run, whoever is first."""
    world = World(store.uri, BEGIN)
    world.apply(schedule(store.uri, missed="all", overlap="queue"))
    world.apply(
        schedule(
            store.uri,
            name="model",
            cron=None,
            when_model_changes=True,
            job=schedule(store.uri).job.model_dump() | {"name": "other"},
        )
    )
    world.now = BEGIN + 3 * DAY
    together = threading.Barrier(8)

    def call(_):
        together.wait()
        return [one.fire for one in run_due(open_store(store.uri), world.edges()) if one.what == "done"]

    with ThreadPoolExecutor(8) as pool:
        done = [one for told in pool.map(call, range(8)) for one in told]
    done += [fire for fire, what in world.call() if what == "done"]
    expected = {moment_id(one) for one in moments_between("0 3 * * *", "Europe/Berlin", BEGIN, world.now)} | {
        "model-000001-" + "a" * 16
    }
    assert Counter(done) == Counter(expected)
    assert world.went == Counter(expected)


@settings(max_examples=25, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=12
    )
)
def test_a_scheduler_that_dies_anywhere_loses_and_doubles_nothing(tmp_path_factory, calls):
    """Calls at random times, most of which are killed at a random write; then one that is left alone."""
    world = World(str(tmp_path_factory.mktemp("dies")), BEGIN)
    world.apply(schedule(world.to, cron="15 */8 * * *", missed="all", overlap="queue"))
    now = BEGIN
    for hours, writes, after, dies in calls:
        now += hours * HOUR
        with contextlib.suppress(Died):
            world.call(now, Fragile(world.to, writes if dies else 0, after))
    end = now + CHECK_LEASE
    for _ in range(4):  # as often as one fire may be tried
        end += START_LEASE + MINUTE
        world.call(end)
    expected = {moment_id(one) for one in moments_between("15 */8 * * *", "Europe/Berlin", BEGIN, end)}
    results = outcomes(world)
    assert set(results) == expected
    assert set(world.went.values()) <= {1}
    tried = {fire.id: len(fire.attempts) for fire, _ in history(open_store(world.to), "weekly")}
    assert {one for one, result in results.items() if result != "done"} <= {one for one, n in tried.items() if n == 3}
    assert {one for one, result in results.items() if result == "done"} == set(world.went)


def test_a_call_reads_only_what_is_open(world, monkeypatch):
    """Years of history do not make a call slow: fires that have ended are listed, not read."""
    world.apply(schedule(world.to, missed="all"))
    world.call(BEGIN + 9 * DAY)
    read = []
    monkeypatch.setattr(fires, "read_fire", lambda *a, real=fires.read_fire: read.append(a) or real(*a))
    assert list(run_due(open_store(world.to), world.edges())) == []
    assert read == []


def test_an_error_that_nobody_foresaw_ends_its_run_alone(world):
    for name in ("a", "b"):
        job = schedule(world.to).job.model_dump() | {"name": name}
        world.apply(schedule(world.to, name=name, job=job))
    world.now = utc("2026-10-20T01:00")
    edges = world.edges()

    def start(job, by, note):
        world.result = "failed" if job.name == "a" else "done"
        world.start(job, by, note)
        if job.name == "a":
            raise ZeroDivisionError

    told = run_due(open_store(world.to), type(edges)(**{**edges.__dict__, "start": start}))
    assert [(one.schedule, one.what, one.code) for one in told] == [("a", "failed", 1), ("b", "done", 0)]
