"""Runs on a real Ray cluster: submitted, cancelled, resumed, lost, retried – always to the same digest."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from clusters_for_tests import NodeOf, RayCluster, tree
from jobs_for_tests import tiny_job
from models_for_tests import write_tiny_model

import cluster.hardware as cluster_hardware
from cluster.errors import InputError
from cluster.ray_jobs import RayJobs
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from jobs import submission
from jobs.admission import Admission
from jobs.following import follow, look, wait_for
from jobs.job import Job
from jobs.records import list_runs, log_key
from jobs.running import carry_out

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PATIENCE = 600
LAYERS = 40


@pytest.fixture(scope="module")
def cluster():
    """A head that could run drivers but should not, and two nodes; four GPUs and one unit of quota in all."""
    nodes = (NodeOf(cpus=3, gpus=2, resources={"quota-retail": 1}), NodeOf(cpus=2, gpus=2))
    with RayCluster(*nodes, head=NodeOf(cpus=1)) as one:
        before = {name: os.environ.get(name) for name in one.client_environment()}
        os.environ.update(one.client_environment())
        yield one
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def jobs(cluster):
    return RayJobs(cluster.url)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of many blocks, and beside it a profile of one core: what is timed here is not looked at."""
    directory = tmp_path_factory.mktemp("submitted")
    profile = Path(cluster_hardware.__path__[0]) / "cpu-local.yaml"
    (directory / "one-core.yaml").write_text(profile.read_text().replace("cores: 2", "cores: 1"))
    return write_tiny_model(directory / "model", layers=LAYERS, hidden=32, ffn=64)


def job_for(model, to, **changes) -> Job:
    hardware, machines = str(model.parent / "one-core.yaml"), {"gpus_per_worker": 1}
    own = {"tenant": "retail", "hardware": hardware, "cluster": machines} | changes
    return Job.model_validate(tiny_job(model, to, **own))


def wait_until(condition, what):
    assert wait_for(condition, PATIENCE), what


def blocks(to) -> int:
    return len(list(to.glob("runs/*/blocks/*/*.json")))


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, words)],
        capture_output=True, text=True, check=False, timeout=PATIENCE, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(cluster, jobs, model, tmp_path_factory):
    """One submission from start to end; its digest is what the others are held against."""
    to = tmp_path_factory.mktemp("undisturbed") / "store"
    job = job_for(model, to)
    began = time.monotonic()
    done = submission.submit(job, cluster.url)
    view = submission.watch(open_store(str(to)), job.run, None, lambda view: None)
    print(f"submit to finish: {time.monotonic() - began:.1f} s")
    assert view.state == "done", (view.explain(), jobs.log(done.started.attempt))
    return {"job": job, "to": to, "digest": view.last.ended.digest, "attempt": done.started.attempt}


def test_a_submitted_run_ends_as_it_does_here_off_the_head(cluster, jobs, undisturbed, model, tmp_path):
    job = job_for(model, tmp_path, cluster={})
    with session(ClusterSpec(), cpus=3):
        began = time.monotonic()
        here = carry_out(job, lambda event: None, lambda: False)
        print(f"the same here, on a Ray that is there: {time.monotonic() - began:.1f} s")
    assert here.published.digest == undisturbed["digest"]
    head = next(node.node_id for node in jobs.nodes() if node.head)
    told = jobs._get(f"/api/jobs/{undisturbed['attempt']}")
    assert told["driver_node_id"] != head
    log = (undisturbed["to"] / f"runs/{undisturbed['job'].run}/logs/1.txt").read_text()
    assert f"prune {LAYERS}/{LAYERS}" in log
    assert "Release: tiny@1" in log
    assert cluster.token not in log


def test_a_run_that_is_done_is_not_submitted_again(cluster, undisturbed):
    again = submission.submit(undisturbed["job"], cluster.url)
    assert not again.fresh
    assert "done already" in again.sentences[0]
    (run,) = list_runs(open_store(str(undisturbed["to"])), pytest.fail)
    assert len(run.attempts) == 1


def test_two_submits_are_one_attempt_and_a_cancelled_one_goes_on(cluster, jobs, undisturbed, model, tmp_path):
    job, store = job_for(model, tmp_path), open_store(str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: submission.submit(job, cluster.url), range(2)))
    assert {one.started.number for one in both} == {1}
    wait_until(lambda: blocks(tmp_path) >= 1, "no block was pruned")
    view = submission.cancel(store, job.run)
    assert (view.state, view.code) == ("cancelled", 130)
    left = blocks(tmp_path)
    assert f"stopped after block {left} of {LAYERS}" in view.explain().sentence
    assert 0 < left < LAYERS
    wait_until(lambda: not jobs.holds(jobs.look(view.last.started.attempt).job_id), "something is still held")
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/blocks/*/*.json")}
    with pytest.raises(InputError, match="is cancelled already"):
        submission.cancel(store, job.run)
    assert submission.resume(store, job.run).started.number == 2
    with pytest.raises(InputError, match="follows it"):
        submission.retry(store, job.run)
    view = submission.watch(store, job.run, None, lambda view: None)
    assert (view.state, view.last.ended.digest) == ("done", undisturbed["digest"])
    assert {path: path.stat().st_mtime_ns for path in first} == first, "a finished block was pruned again"
    with pytest.raises(InputError, match="is done, not cancelled or lost"):
        submission.resume(store, job.run)


@pytest.mark.slow
def test_a_killed_driver_is_lost_and_tried_again(cluster, undisturbed, model, tmp_path):
    job, store = job_for(model, tmp_path), open_store(str(tmp_path))
    attempt = submission.submit(job, cluster.url).started
    wait_until(lambda: blocks(tmp_path) >= 1, "no block was pruned")
    os.kill(cluster.driver_pid(attempt.attempt), signal.SIGKILL)
    view = submission.watch(store, job.run, None, lambda view: None, retries=1)
    assert (view.state, view.last.ended.digest) == ("done", undisturbed["digest"])
    lost, _ = view.run.attempts
    assert (lost.ended.result, lost.ended.code) == ("lost", 75)
    assert "killed" in lost.ended.sentence
    assert "prune 1/" in store.get(log_key(lost.started)).decode(), "the log was not saved from the cluster"


def test_bad_input_is_never_tried_again(cluster, model, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    data = {"calibration": {"source": str(tmp_path / "empty.txt"), "windows": 4}}
    job = job_for(model, tmp_path / "store", data=data)
    submission.submit(job, cluster.url)
    view = submission.watch(open_store(job.publish.to), job.run, None, lambda view: None, retries=2)
    assert (view.state, view.code, len(view.run.attempts)) == ("bad input", 2, 1)
    assert "empty.txt holds no text" in view.explain().sentence
    again = submission.retry(open_store(job.publish.to), job.run, by="schedule:nightly")  # by somebody, it is
    assert (again.started.number, again.started.by) == (2, "schedule:nightly")
    assert submission.watch(open_store(job.publish.to), job.run, None, lambda view: None).state == "bad input"


def test_a_queued_run_says_which_number_blocks_and_can_be_cancelled(cluster, jobs, model, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "admitted", lambda job, by: (Admission(job, resources={"quota-retail": 1}), None))
    jobs._client.submit_job(entrypoint="sleep 600", submission_id="holder", entrypoint_resources={"quota-retail": 1})
    wait_until(lambda: sum(node.free.get("quota-retail", 0) for node in jobs.nodes()) == 0, "the quota is not held")
    job, store = job_for(model, tmp_path), open_store(str(tmp_path))
    submission.submit(job, cluster.url)
    view = look(store, job.run, jobs)
    assert view.state == "queued"
    assert "quota-retail: asked 1, cluster has 1, free 0" in view.explain().sentence
    assert submission.cancel(store, job.run).state == "cancelled"
    jobs.stop("holder")
    wait_until(lambda: jobs.look(f"{job.run}-a1").over, "the cancelled attempt hangs in Ray's queue")
    assert len(look(store, job.run, jobs).run.attempts) == 1
    assert not list(tmp_path.glob("runs/*/steps/*")), "it worked although it was cancelled"


def test_a_gang_that_is_too_big_is_explained_and_a_cancel_ends_the_waiting(cluster, jobs, model, tmp_path):
    job = job_for(model, tmp_path, cluster={"workers": 3, "gpus_per_worker": 2})
    store = open_store(str(tmp_path))
    attempt = submission.submit(job, cluster.url).started
    seen = follow(store, job.run, jobs, lambda view: None, stop=lambda: bool(jobs.see(attempt.attempt).gangs))
    assert not seen.over, seen.explain()
    explanation = look(store, job.run, jobs).explain()
    assert "GPU: asked 3 x 2, cluster has 4" in explanation.sentence
    assert "too small" in explanation.hint
    view = submission.cancel(store, job.run, grace=PATIENCE)
    assert (view.state, view.last.ended.sentence) == ("cancelled", "stopped while waiting for machines")


def test_a_cancel_waits_for_a_block_no_longer_than_its_grace(cluster, jobs, model, tmp_path):
    job = job_for(model, tmp_path)
    store = open_store(str(tmp_path))
    submission.submit(job, cluster.url)
    wait_until(lambda: blocks(tmp_path), "it does not begin to prune")
    everybody = [process for node in cluster.processes for process in tree(node)]
    workers = [one for one in everybody if "ray::ShardWorker" in " ".join(one.cmdline())]
    assert workers
    for one in workers:
        one.suspend()  # the block at hand will never be done
    try:
        began = time.monotonic()
        view = submission.cancel(store, job.run, grace=1)
        assert time.monotonic() - began < 60
    finally:
        for one in workers:
            with suppress(psutil.NoSuchProcess):
                one.resume()
    assert (view.state, view.last.ended.sentence[:26]) == ("cancelled", "stopped after 1 s of grace")


def test_a_wrong_token_and_a_cluster_that_is_not_there(cluster, undisturbed, tmp_path):
    store, run = undisturbed["to"], undisturbed["job"].run
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(undisturbed["job"].model_dump(mode="json")))
    refused = command("submit", path, "--cluster", cluster.url, RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 2, refused.stderr
    assert "refuses the token" in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr
    away = command("status", run, "--from", store, "--cluster", "http://127.0.0.1:9")
    assert away.returncode == 75, away.stderr
    assert "http://127.0.0.1:9 is out of reach" in away.stderr
    assert "Traceback" not in refused.stderr + away.stderr


def test_runs_are_there_when_the_cluster_is_gone(cluster, undisturbed):
    store, run = undisturbed["to"], undisturbed["job"].run
    cluster.stop()
    listed = command("list", "--from", store)
    assert run in listed.stdout, listed.stderr
    assert "tiny@1" in listed.stdout
    (row,) = json.loads(command("list", "--from", store, "--json").stdout)
    assert (row["state"], row["tenant"], row["digest"]) == ("done", "retail", undisturbed["digest"])
    shown = command("status", run[:-4], "--from", store)
    assert f"{run}: done" in shown.stdout, shown.stderr
    assert "Release: tiny@1" in command("logs", run, "--from", store).stdout
    assert "karikomi pull tiny@1" in command("explain", run, "--from", store).stdout
    assert command("retry", run, "--from", store).returncode == 75
