"""Why a run waits or how it ended, in words: the number that blocks, and the way on."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from cluster.ray_facts import Cluster, RayJob, RayNode, free_of
from jobs.explaining import ASKS, LABELS, age, blocking, ending_by_ray, explain_attempt, merged_state
from jobs.package import place_of_driver
from jobs.records import Attempt, Ended, Progress, Started

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def node(name="a", head=False, free=None, labels=None, **total):
    return RayNode(name, head, total, total if free is None else free, labels or {})


def ray_job(status="PENDING", asks=None, labels=None, **more):
    metadata = {ASKS: json.dumps(asks or {"CPU": 1}), LABELS: json.dumps(labels or {})}
    return RayJob(
        **{"status": status, "message": "", "exit_code": None, "error_type": None, "metadata": metadata} | more
    )


def attempt(progress=None, ended=None, ago=90):
    started = Started(
        run="tiny-1", number=1, tenant="retail", name="tiny", by="ann@host", cluster="http://head:8265",
        at=NOW - timedelta(seconds=ago),
    )  # fmt: skip
    return Attempt(started=started, progress=progress, ended=ended)


def explained(one, seen=None):
    explanation = explain_attempt(one, merged_state(one, seen, NOW), seen, NOW)
    return explanation.sentence, explanation.hint


def test_a_queued_run_names_the_resource_that_is_taken():
    nodes = (node(CPU=4, quota=2, free={"CPU": 4, "quota": 0}), node("b", CPU=4))
    sentence, hint = explained(attempt(), Cluster(ray_job(asks={"CPU": 1, "quota": 1}), nodes))
    assert sentence == "queued for 90 s: it waits for 1 quota (quota: asked 1, cluster has 2, free 0)"
    assert "starts by itself" in hint


def test_what_no_node_can_hold_never_starts():
    assert blocking({"CPU": 8}, {}, [node(CPU=4), node("b", CPU=6)]) == (
        "no node is big enough for 8 CPU (CPU: asked 8, most on one node 6)"
    )
    sentence, hint = explained(attempt(), Cluster(ray_job(asks={"CPU": 8}), (node(CPU=4),)))
    assert "no node is big enough" in sentence
    assert "karikomi cancel tiny-1" in hint


def test_a_label_that_no_node_has_is_named():
    asks, labels = {"CPU": 1}, {"karikomi": "driver"}
    assert "labelled karikomi=driver; none of 1 nodes is" in blocking(asks, labels, [node(CPU=4)])
    assert blocking(asks, labels, [node(CPU=4, labels=labels)]) is None
    away = {"ray.io/node-id": "!h"}
    head = node("h", head=True, CPU=4, labels={"ray.io/node-id": "h"})
    assert "none of 1 nodes" in blocking(asks, away, [head])
    assert blocking(asks, away, [head, node("w", CPU=1, labels={"ray.io/node-id": "w"})]) is None


def test_free_on_two_nodes_is_not_free_on_one():
    nodes = [node(CPU=4, free={"CPU": 1}), node("b", CPU=4, free={"CPU": 1})]
    assert blocking({"CPU": 2}, {}, nodes) == "it waits for 2 CPU (CPU: asked 2, cluster has 8, free 2)"


def test_a_driver_is_kept_off_the_head():
    head = node("h", head=True, CPU=4)
    assert place_of_driver([head])[0] == {}
    assert place_of_driver([head, node("w", CPU=1)])[0] == {"ray.io/node-id": "!h"}
    assert place_of_driver([head, node("w", CPU=1, labels={"karikomi": "driver"})])[0] == {"karikomi": "driver"}


def test_a_running_run_says_how_far_it_is_and_what_its_gang_waits_for():
    progress = Progress(at=NOW, step="prune", stage=1, stages=2, done=3, total=18)
    one, job = attempt(progress), ray_job("RUNNING")
    assert explained(one)[0] == "running: stage 1 of 2, prune 3 of 18"
    nodes = (node(CPU=8, GPU=4, free={"CPU": 8, "GPU": 1}),)
    sentence, hint = explained(one, Cluster(job, nodes, (({"CPU": 1, "GPU": 1},) * 2,)))
    assert "waits for 2 workers" in sentence
    assert "GPU: asked 2 x 1, cluster has 4, free 1" in sentence
    assert "by itself" in hint
    _, hint = explained(one, Cluster(job, nodes, (({"GPU": 1},) * 5,)))
    assert "too small" in hint


def test_silence_is_lost_unless_the_cluster_sees_the_driver_live():
    one = attempt(Progress(at=NOW - timedelta(seconds=200), step="prune"))
    assert merged_state(one, None, NOW) == "lost"
    assert "karikomi retry tiny-1" in explained(one)[1]
    seen = Cluster(ray_job("RUNNING"))
    assert merged_state(one, seen, NOW) == "running"
    assert "told nothing for 3 min" in explained(one, seen)[0]


@pytest.mark.parametrize(
    ("job", "began", "result", "code", "words"),
    [
        (None, True, "lost", 75, "does not know it any more"),
        (ray_job("FAILED", exit_code=-9), True, "lost", 75, "killed (exit code -9)"),
        (ray_job("FAILED", exit_code=1), True, "lost", 75, "killed (exit code 1)"),
        (ray_job("FAILED", exit_code=1, message="No module named jobs"), False, "failed", 1, "No module named jobs"),
        (ray_job("FAILED", exit_code=2), False, "bad input", 2, "without a record"),
        (ray_job("FAILED", exit_code=75), True, "lost", 75, "exit code 75"),
        (ray_job("FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED", message="node died"), True, "lost", 75, "node died"),
        (ray_job("FAILED", error_type="RUNTIME_ENV_SETUP_FAILURE"), False, "failed", 1, "package"),
        (ray_job("STOPPED"), True, "cancelled", 130, "stopped at the cluster"),
    ],
)
def test_how_an_attempt_ended_that_left_no_record(job, began, result, code, words):
    ended = ending_by_ray(job, began, NOW)
    assert (ended.result, ended.code) == (result, code)
    assert words in ended.sentence


def test_a_job_that_rays_queue_gave_up_says_what_to_set():
    job = ray_job("FAILED", error_type="JOB_SUPERVISOR_ACTOR_START_TIMEOUT", message="failed to start in 900.0 seconds")
    ended = ending_by_ray(job, False, NOW)
    assert (ended.result, ended.code) == ("lost", 75)
    sentence, hint = explained(attempt(ended=ended))
    assert "900.0 seconds" in sentence
    assert "RAY_JOB_START_TIMEOUT_SECONDS" in hint
    assert "karikomi retry tiny-1" in hint


def test_what_lives_has_not_ended():
    assert ending_by_ray(ray_job("PENDING"), False, NOW) is None
    assert ending_by_ray(ray_job("RUNNING"), True, NOW) is None


@pytest.mark.parametrize(
    ("result", "code", "way"),
    [
        ("done", 0, "karikomi pull tiny@1"),
        ("gate not met", 3, "target.sparsity"),
        ("bad input", 2, "Correct the file."),
        ("cancelled", 130, "karikomi resume tiny-1"),
        ("failed", 1, "karikomi logs tiny-1"),
    ],
)
def test_every_ending_has_a_way_on(result, code, way):
    release, hint = ("tiny@1" if code == 0 else ""), ("Correct the file." if code == 2 else "")
    ended = Ended(at=NOW, code=code, result=result, sentence="words", release=release, hint=hint)
    sentence, hint = explained(attempt(ended=ended))
    assert sentence.endswith("words")
    assert way in hint


def test_rays_usage_lines_are_read():
    total = {"CPU": 4.0, "GPU": 2.0, "memory": 1000.0}
    usage = "1.5/4.0 CPU (1.0 used of 2.0 reserved in placement groups)\n2.0/2.0 GPU\n0B/1.2GiB memory"
    assert free_of(total, usage) == {"CPU": 1.5, "GPU": 0.0, "memory": 1000.0}


@pytest.mark.parametrize(("seconds", "words"), [(-1, "0 s"), (90, "90 s"), (300, "5 min"), (7200, "2 h"), (2e5, "2 d")])
def test_ages(seconds, words):
    assert age(seconds) == words
