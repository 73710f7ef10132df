"""A run's records: claimed once each, read back whole, a state derived from them alone."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from cluster.errors import Cancelled, InputError, Unavailable
from cluster.storage import open_store
from jobs.endings import ending_of
from jobs.job import parse_job
from jobs.metering import Meter, held
from jobs.records import Ended, Progress, Usage, claim, list_runs, note_end, note_progress, read_run
from jobs.running import AttemptLog
from workflows.events import Advanced, GateJudged, StepEnded, StepStarted

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
JOB = """
name: tiny
model: somewhere
target: {pattern: "2:4", sparsity: 0.5}
stages: [{sparsity: 0.5, tune: {steps: 3, ranks: 3}}]
threads: 2
cluster: {workers: 4, gpus_per_worker: 0.5}
device: cuda
publish: {to: DIRECTORY}
"""


def claimed(store):
    return claim(store, "tiny-1", "retail", "tiny", "ann@host", "embedded", b"name: tiny\n")


def ended(**changes):
    return Ended(**{"at": NOW, "code": 0, "result": "done", "sentence": "fine", "usage": Usage(seconds=3)} | changes)


def test_claimants_get_numbers_of_their_own(store):
    with ThreadPoolExecutor(8) as pool:
        attempts = list(pool.map(lambda _: claimed(store), range(8)))
    assert sorted(one.number for one in attempts) == list(range(1, 9))
    assert {one.attempt for one in attempts} == {f"tiny-1-a{number}" for number in range(1, 9)}


def test_a_state_is_derived_from_the_records(store):
    first = claimed(store)
    assert read_run(store, "tiny-1").state(NOW) == "queued"
    note_progress(store, first, Progress(at=NOW, step="prune", stage=1, done=3, total=9, usage=Usage(cpu_seconds=7)))
    assert read_run(store, "tiny-1").state(NOW + timedelta(seconds=59)) == "running"
    assert read_run(store, "tiny-1").state(NOW + timedelta(seconds=61)) == "lost"
    assert note_end(store, first, ended(code=75, result="lost"))
    assert not note_end(store, first, ended()), "the first to say how it ended is believed"
    second = claimed(store)
    assert note_end(store, second, ended())
    (run,) = list_runs(store, pytest.fail)
    assert (run.state(NOW), [one.state(NOW) for one in run.attempts]) == ("done", ["lost", "done"])
    assert run.usage == Usage(seconds=6)


def test_runs_that_were_never_attempted_are_not_listed(store):
    store.put("runs/old/steps/x.json", b"{}")
    assert list(list_runs(store, pytest.fail)) == []
    assert read_run(store, "nothing") is None


def test_a_record_of_other_code_is_named(store):
    claimed(store)
    store.put("runs/tiny-1/attempts/1/started.json", b'{"colour": "red"}')
    with pytest.raises(InputError, match=r"attempts/1/started.json is no record"):
        read_run(store, "tiny-1")


def test_what_steps_hold():
    job = parse_job(JOB, "job.yaml")
    assert held(job, "prune", 1) == (8, 2)
    assert held(job, "tune", 1) == (6, 3)
    assert held(job, "measure", 0) == (2, 1)
    assert held(job, "format", 0) == (1, 0)


def test_a_step_that_never_ended_counts_too(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("jobs.metering.time.monotonic", lambda: clock[0])
    meter = Meter(parse_job(JOB, "job.yaml"))
    meter(StepStarted("prune", 1))
    clock[0] = 10.0
    meter(StepEnded("prune", 1, 10.0, resumed=False))
    meter(StepEnded("evaluate", 1, 99.0, resumed=True))
    meter(StepStarted("tune", 1))
    clock[0] = 15.0
    assert meter.usage() == Usage(seconds=15, cpu_seconds=8 * 10 + 6 * 5, gpu_seconds=2 * 10 + 3 * 5)


def cancelled_on_the_way(attempt: AttemptLog) -> None:
    with attempt.alive():
        attempt(StepStarted("windows"))
        assert list(attempt.store.keys("")) == [], "bad input leaves no trace"
        attempt(StepEnded("windows", 0, 1.0, resumed=False))
        attempt(Advanced("prune", 1, 2, 5))
        attempt(GateJudged(1, True, "perplexity rose 1 %"))
        raise Cancelled("stopped after block 2")


def test_an_attempt_tells_the_store(tmp_path):
    job = parse_job(JOB.replace("DIRECTORY", str(tmp_path)), "job.yaml")
    store = open_store(str(tmp_path))
    with pytest.raises(Cancelled):
        cancelled_on_the_way(AttemptLog(job, store, None))
    last = read_run(store, job.run).last
    assert last.ended is not None
    assert (last.ended.result, last.ended.code, last.ended.sentence) == ("cancelled", 130, "stopped after block 2")
    assert parse_job(store.get(f"runs/{job.run}/job.yaml").decode(), "kept").run == job.run
    assert len(store.get(f"runs/{job.run}/events/1.jsonl").splitlines()) == 4


@pytest.mark.parametrize(
    ("error", "result", "code"),
    [
        (InputError("bad"), "bad input", 2),
        (Unavailable("gone"), "lost", 75),
        (KeyboardInterrupt(), "cancelled", 130),
        (RuntimeError("bug"), "failed", 1),
    ],
)
def test_every_error_is_an_ending(error, result, code):
    ending = ending_of(error)
    assert (ending.result, ending.code) == (result, code)
