"""A schedule on Kubernetes: what an operator and Kueue need is there, and what Kubernetes cannot keep is refused."""

import pytest
import yaml
from schedules_for_tests import schedule

from cluster.errors import InputError
from jobs.job import Job
from jobs.manifests import KUBECTL, NO_QUEUE, dns, manifests

TO = "s3://models/retail"
CHECK = {"data": {"source": "s3://in-house/today.parquet"}, "check": "0 2 * * *"}


def of(plan, form="cronjob"):
    return list(yaml.safe_load_all(manifests(plan, form, "registry/karikomi:0.1", "retail")))


def with_job(**changes):
    plan = schedule(TO)
    job = Job.model_validate(plan.job.model_dump() | {"tenant": "retail"} | changes)
    return plan.model_copy(update={"job": job})


def test_a_cron_job_creates_a_ray_job():
    account, role, binding, config, cron = of(with_job())
    spec = cron["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("0 3 * * *", "Europe/Berlin", "Forbid")
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (container,) = pod["containers"]
    assert (container["image"], container["args"]) == (KUBECTL, ["create", "-f", "/rayjob/rayjob.yaml"])
    assert pod["volumes"][0]["configMap"]["name"] == config["metadata"]["name"]
    assert {one["metadata"]["namespace"] for one in (account, role, binding, config, cron)} == {"retail"}
    ray_job = yaml.safe_load(config["data"]["rayjob.yaml"])
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    assert ray_job["metadata"]["generateName"].startswith("karikomi-weekly-")
    assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "karikomi-retail"
    assert_a_ray_job(ray_job["spec"])


def assert_a_ray_job(spec):
    assert spec["entrypoint"] == f"karikomi schedule run-due weekly --from {TO} --cluster auto"
    assert spec["shutdownAfterJobFinishes"] is True, "Kueue wants it"
    assert spec["backoffLimit"] == 0, "bad input is never tried again"
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == "karikomi-retail"
        assert pod["containers"][0]["image"] == "registry/karikomi:0.1"
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "karikomi-retail", "optional": True}}]


def test_kuberays_own_form():
    plan = with_job()
    (cron,) = of(plan, "raycronjob")
    assert (cron["apiVersion"], cron["kind"]) == ("ray.io/v1", "RayCronJob")
    assert (cron["spec"]["schedule"], cron["spec"]["timeZone"]) == ("0 3 * * *", "Europe/Berlin")
    assert_a_ray_job(cron["spec"]["jobTemplate"])
    assert manifests(plan, "raycronjob", "i", "n").startswith(NO_QUEUE)


def test_every_trigger_has_an_alarm():
    plan = schedule(TO, when_model_changes=True, when_gate_fails=CHECK)
    alarms = {one["metadata"]["name"]: one["spec"]["schedule"] for one in of(plan) if one["kind"] == "CronJob"}
    assert alarms == {
        "karikomi-weekly-cron": "0 3 * * *",
        "karikomi-weekly-model": "0 * * * *",
        "karikomi-weekly-gate": "0 2 * * *",
    }
    assert [one["kind"] for one in of(schedule(TO, cron=None, when_model_changes=True), "raycronjob")] == ["RayCronJob"]


def test_the_cluster_is_as_wide_as_the_job():
    wide = {
        "cluster": {"workers": 2, "gpus_per_worker": 1},
        "device": "cuda",
        "threads": 3,
        "stages": [{"sparsity": 0.5, "tune": {"ranks": 4}}],
    }
    config = next(one for one in of(with_job(**wide)) if one["kind"] == "ConfigMap")
    (group,) = yaml.safe_load(config["data"]["rayjob.yaml"])["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) * 2 >= 4 * 3, "four ranks of three threads have room on two workers"
    assert limits["nvidia.com/gpu"] * 2 >= 4
    narrow = next(one for one in of(with_job()) if one["kind"] == "ConfigMap")
    assert "nvidia.com/gpu" not in narrow["data"]["rayjob.yaml"]


@pytest.mark.parametrize("cron", ["0 3 * * 7", "0 3 L * *", "0 3 * * MON#1", "0 3 LW * *", "0 3 * * 5L", "0 3 * * 5-7"])
def test_what_kubernetes_does_not_know_is_refused(cron):
    with pytest.raises(InputError, match="Kubernetes does not know"):
        manifests(schedule(TO, cron=cron), "cronjob", "i", "n")


@pytest.mark.parametrize("cron", ["0 3 * JUL *", "0 3 * * WED", "7 3 7 * *"])
def test_what_it_knows_is_not(cron):
    assert f"schedule: {cron}" in manifests(schedule(TO, cron=cron), "cronjob", "i", "n")


def test_a_directory_is_no_place_for_pods(tmp_path):
    with pytest.raises(InputError, match="which pods cannot reach"):
        manifests(schedule(str(tmp_path)), "cronjob", "i", "n")


def test_names_are_kubernetes_names_and_stay_apart():
    names = [dns(one, 30) for one in ("a.b", "a_b", "a-b", "x" * 30, "x" * 31, "x" * 31 + "y", "a.")]
    assert len(set(names)) == len(names)
    assert all(len(one) <= 30 and one == one.lower() and one.strip("-") == one and "." not in one for one in names)
