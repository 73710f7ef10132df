"""The doctor at a real Ray cluster with token authentication."""

import pytest
from clusters_for_tests import NodeOf, RayCluster

from jobs.checks.ray_cluster import ray_cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    with RayCluster(NodeOf(cpus=2, resources={"tenant-retail": 4}, labels={"karikomi": "driver"})) as one:
        yield one


def test_it_is_well_for_who_has_the_token(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    findings = ray_cluster(cluster.url)
    assert {one.state for one in findings} == {"ok"}, findings
    text = {one.name: one.finding for one in findings}
    assert text["cluster"].startswith(f"{cluster.url} answers, Ray ")
    assert text["cluster's token"] == "asked for, and ours is right"
    assert text["cluster's nodes"] == "2 nodes, 2 CPUs, 0 GPUs"
    assert text["cluster's drivers"] == "run on 1 node of their own"
    assert text["cluster's quotas"] == "retail 4"


@pytest.mark.parametrize("token", ["wrong-and-secret", ""])
def test_and_shut_for_who_has_not(cluster, token, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("HOME", str(tmp_path))  # no token file
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    [found] = ray_cluster(cluster.url)
    assert found.state == "fail"
    assert "does not take this token" in found.finding
    assert "RAY_AUTH_TOKEN" in found.advice
    assert "secret" not in str(found)
