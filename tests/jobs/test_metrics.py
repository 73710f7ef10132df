"""Metrics of runs, made from records: parsed by Prometheus's own parser, scraped over HTTP, named by the dashboard."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import InputError
from cluster.storage import open_store
from jobs.exporting import Scraped, serve, write_whole
from jobs.job import parse_job
from jobs.measures import GateMeasure, Measures, StepMeasure, note_measures, read_measures
from jobs.metrics import RUN, RunCollector, exposition
from jobs.records import Ended, Progress, Usage, claim, note_end, note_progress
from jobs.running import AttemptLog
from workflows.events import Advanced, GateJudged, StepEnded, StepStarted

DASHBOARD = Path(__file__).parents[2] / "cluster" / "deploy" / "grafana" / "karikomi.json"
NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def now():
    """The moment of the test, not of its collection: a heartbeat of then is a lost run's when the test's turn comes."""
    global NOW
    NOW = datetime.now(UTC)


def claimed(store, run, tenant="retail", name="chat", cluster="http://head:8265"):
    return claim(store, run, tenant, name, "ann@host", cluster, b"name: chat\n")


def fill(store):
    """Five runs: done after a lost attempt, running, queued, lost, and one that ended long ago."""
    first = claimed(store, "chat-1")
    note_end(store, first, ended(75, "lost", usage=Usage(cpu_seconds=100, gpu_seconds=50)))
    second = claimed(store, "chat-1")
    note_progress(store, second, Progress(at=NOW, step="publish", stages=2))
    measures = Measures(
        began=second.at + timedelta(seconds=7),
        steps=(StepMeasure(step="prune", stage=1, seconds=12.5),),
        gates=(
            GateMeasure(stage=1, passed=True, perplexity_increase=0.016, worst_slice_increase=-0.01),
            GateMeasure(stage=2, passed=False, perplexity_increase=None, worst_slice_increase=None),
        ),
        dense_bytes=1000,
        compressed_bytes=800,
    )
    note_measures(store, second, measures)
    usage = Usage(seconds=9, cpu_seconds=20, gpu_seconds=10)
    note_end(store, second, ended(0, "done", release="chat@3", digest="d" * 64, usage=usage))
    running = claimed(store, "chat-2")
    note_progress(store, running, Progress(at=NOW, step="prune", stage=1, stages=2, done=7, total=18))
    claimed(store, "chat-3", tenant="wholesale")
    lost = claimed(store, "chat-4", tenant="wholesale")
    note_progress(store, lost, Progress(at=NOW - timedelta(minutes=10)))
    old = claimed(store, "chat-old", tenant="wholesale")
    note_end(store, old, ended(1, "failed", at=NOW - timedelta(days=30), usage=Usage(gpu_seconds=5)))


def ended(code, result, **changes):
    return Ended(**{"at": NOW, "code": code, "result": result, "sentence": "so it went"} | changes)


def parsed(text):
    """{name: {labels that are not RUN's, run included: value}}."""
    found = {}
    for family in text_string_to_metric_families(text if isinstance(text, str) else text.decode()):
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()) if name not in ("tenant", "name"))
            key = labels if "run" in sample.labels else tuple(sample.labels[name] for name in sorted(sample.labels))
            found.setdefault(sample.name, {})[key] = sample.value
    return found


def test_every_state_and_number_comes_out(store):
    fill(store)
    found = parsed(exposition(store, days=7))
    assert found["karikomi_runs"] == {
        ("done", "retail"): 1, ("running", "retail"): 1, ("queued", "wholesale"): 1, ("lost", "wholesale"): 1,
        ("failed", "wholesale"): 1,
    }  # fmt: skip
    assert found["karikomi_run_state"] == {
        ("chat-1", "done"): 1, ("chat-2", "running"): 1, ("chat-3", "queued"): 1, ("chat-4", "lost"): 1,
    }  # fmt: skip
    ends = found["karikomi_attempts_ended_total"]
    assert {key for key, count in ends.items() if count} == {("75", "retail"), ("0", "retail"), ("1", "wholesale")}
    assert ends["2", "wholesale"] == 0, "a counter that is there before it first rises"
    assert found["karikomi_run_attempts_total"][("chat-1",)] == 2
    assert (found["karikomi_run_stage"][("chat-2",)], found["karikomi_run_stages"][("chat-2",)]) == (1, 2)
    assert found["karikomi_run_step_done"][("chat-2", "prune")] == 7
    assert found["karikomi_run_step_total"][("chat-2", "prune")] == 18
    assert found["karikomi_run_step_seconds"] == {("chat-1", "1", "prune"): 12.5}
    assert found["karikomi_run_gate_passed"] == {("chat-1", "1"): 1, ("chat-1", "2"): 0}
    assert found["karikomi_run_gate_perplexity_increase"] == {("chat-1", "1"): 0.016}
    assert found["karikomi_run_gate_worst_slice_increase"] == {("chat-1", "1"): -0.01}
    assert found["karikomi_run_weight_bytes"] == {("dense", "chat-1"): 1000, ("compressed", "chat-1"): 800}
    assert found["karikomi_run_queue_seconds"][("chat-1",)] == pytest.approx(7)
    assert 0 <= found["karikomi_run_queue_seconds"][("chat-3",)] < 600
    assert found["karikomi_tenant_gpu_seconds_total"] == {("retail",): 60, ("wholesale",): 5}
    assert found["karikomi_run_gpu_seconds_total"][("chat-1",)] == 60
    assert found["karikomi_run_cpu_seconds_total"][("chat-1",)] == 120
    assert found["karikomi_runs_unreadable"] == {(): 0}


def test_old_runs_are_in_the_sums_only(store):
    fill(store)
    few, all_ = (parsed(exposition(store, days=days)) for days in (7, 60))
    assert {key[0] for key in all_["karikomi_run_state"]} - {key[0] for key in few["karikomi_run_state"]} == {
        "chat-old"
    }
    assert few["karikomi_runs"] == all_["karikomi_runs"]
    for name, samples in few.items():
        if name.startswith("karikomi_run_"):
            assert all("chat-old" not in key for key in samples), name


def test_one_broken_run_does_not_hide_the_others(store):
    fill(store)
    store.put("runs/chat-2/attempts/1/progress.json", b"{")
    store.put("runs/chat-1/attempts/2/measures.json", b"{")
    found = parsed(exposition(store, days=7))
    assert found["karikomi_runs_unreadable"] == {(): 1}
    assert {key[0] for key in found["karikomi_run_state"]} == {"chat-1", "chat-3", "chat-4"}


def test_what_ended_is_read_once_and_what_did_not_again(tmp_path):
    store = open_store(str(tmp_path))
    fill(store)
    collector = RunCollector(store, days=7)
    list(collector.collect())
    reads = []
    get, store.get = store.get, lambda key: reads.append(key) or get(key)
    retry = claimed(store, "chat-1")
    note_progress(store, retry, Progress(at=NOW))
    states = {sample.labels["run"]: sample.labels["state"]
              for family in collector.collect() if family.name == "karikomi_run_state" for sample in family.samples}  # fmt: skip
    assert states["chat-1"] == "running"
    assert not [key for key in reads if "chat-old" in key]
    assert [key for key in reads if "chat-2" in key]


def test_labels_survive_any_text(tmp_path):
    store = open_store(str(tmp_path))
    claimed(store, "chat-1", cluster='a "quoted"\nback\\slash')
    (family,) = [
        one for one in text_string_to_metric_families(exposition(store, 7).decode()) if one.name == "karikomi_run_info"
    ]
    assert family.samples[0].labels["cluster"] == 'a "quoted"\nback\\slash'


def test_an_attempt_leaves_its_numbers(tmp_path):
    job = parse_job(
        f'name: tiny\nmodel: x\ntarget: {{pattern: "2:4", sparsity: 0.5}}\npublish: {{to: {tmp_path}}}', "job.yaml"
    )
    attempt = AttemptLog(job, open_store(str(tmp_path)), None)
    with attempt.alive():
        for event in (
            StepStarted("windows"),
            StepEnded("windows", 0, 1.0, resumed=True),
            StepEnded("evaluate", 1, 2.0, resumed=False),
            StepEnded("evaluate", 1, 3.0, resumed=False),
            Advanced("tune", 1, 1, 2),
            GateJudged(1, False, "broken", None, None),
        ):
            attempt(event)
        attempt.ended(ended(3, "gate not met"))
    measures = read_measures(attempt.store, job.run, 1)
    assert measures is not None
    assert [(one.step, one.stage, one.seconds) for one in measures.steps] == [("windows", 0, 1.0), ("evaluate", 1, 5.0)]
    assert measures.gates == (GateMeasure(stage=1, passed=False, perplexity_increase=None, worst_slice_increase=None),)


def test_the_command_prints_writes_and_serves(karikomi, tmp_path):
    store = open_store(str(tmp_path / "store"))
    fill(store)
    printed = karikomi("metrics", "--from", store.uri)
    assert printed.returncode == 0, printed.stderr
    assert parsed(printed.stdout)["karikomi_runs"][("running", "retail")] == 1
    file = tmp_path / "karikomi.prom"
    assert karikomi("metrics", "--from", store.uri, "--to", file).returncode == 0
    assert "karikomi_runs" in parsed(file.read_bytes())
    assert [one.name for one in tmp_path.glob("*karikomi.prom*")] == ["karikomi.prom"]
    refused = karikomi("metrics", "--from", store.uri, "--to", file, "--listen", "127.0.0.1:0")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr


def test_where_it_cannot_go_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "no" / "file", b"")
    (tmp_path / "directory").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "directory", b"")
    assert [one.name for one in tmp_path.iterdir()] == ["directory"], "nothing is left behind"
    store = open_store(str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for address in ("nowhere", "127.0.0.1:x", ":1", "127.0.0.1:99999", f"127.0.0.1:{taken.getsockname()[1]}"):
            with pytest.raises(InputError, match="--listen"):
                serve(store, 7, address)


def test_a_store_out_of_reach_is_a_metric_and_no_broken_scrape(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    (only,) = Scraped(open_store("s3://tests/x"), 7).collect()
    assert (only.name, only.samples[0].value) == ("karikomi_store_reachable", 0)


def test_prometheus_can_scrape_it(tmp_path):
    store = open_store(str(tmp_path / "store"))
    fill(store)
    server = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "metrics", "--from", store.uri, "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        for run, state in (("chat-2", "running"), ("chat-5", "queued")):
            claimed(store, "chat-5")
            with urllib.request.urlopen(url, timeout=60) as answer:
                found = parsed(answer.read())
            assert found["karikomi_run_state"][(run, state)] == 1
            assert found["karikomi_store_reachable"] == {(): 1}
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def panels():
    board = json.loads(DASHBOARD.read_text())
    return board, [one for one in board["panels"] if one["type"] != "row"]


def test_the_dashboard_names_only_metrics_and_labels_that_there_are(tmp_path):
    store = open_store(str(tmp_path))
    fill(store)
    classifier = claimed(store, "labels-1")
    fallen = GateMeasure(
        stage=1, passed=True, perplexity_increase=None, worst_slice_increase=None, accuracy_drop=0.004,
        worst_slice_drop=0.01,
    )  # fmt: skip
    note_measures(store, classifier, Measures(began=classifier.at, gates=(fallen,)))
    text = exposition(store, 7).decode() + "karikomi_store_reachable 1\n"
    labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    board, _ = panels()
    expressions = re.findall(r'"(?:expr|query|definition)": "((?:[^"\\]|\\.)*)"', json.dumps(board))
    used = {name for one in expressions for name in re.findall(r"karikomi_\w+", one)}
    assert len(used) > 10
    assert used <= labels.keys(), used - labels.keys()
    for expression in expressions:
        for name, selector in re.findall(r"(karikomi_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= labels[name], (name, selector)
        grouped = {word.strip() for group in re.findall(r"\b(?:by|on|group_left)\s*\(([^)]*)\)", expression)
                   for word in group.split(",") if word.strip()}  # fmt: skip
        names = re.findall(r"karikomi_\w+", expression)
        assert grouped <= set().union(*(labels[name] for name in names)) if names else True, expression
        if not expression.startswith("label_values"):  # Grafana's own, for its variables
            promql_parser.parse(json.loads(f'"{expression}"'))


def test_the_dashboard_is_one_that_grafana_takes():
    board, shown = panels()
    assert board["schemaVersion"] >= 39
    assert board["uid"] == "karikomi"
    assert board["id"] is None, "Grafana gives the id"
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert len({one["id"] for one in board["panels"]}) == len(board["panels"])
    for panel in shown:
        assert panel["title"]
        assert panel["description"], panel["title"]
        assert panel["datasource"] == source
        for target in panel["targets"]:
            assert (target["datasource"], bool(target["expr"])) == (source, True)
            for name in re.findall(r"\$(?!__)\{?(\w+)", target["expr"]):
                assert name in variables
    taken = {}
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"], "panels overlap"
    for wanted in ("Runs by state", "Progress", "Perplexity", "Worst slice", "GPU", "wait", "exit code"):
        assert any(wanted.lower() in panel["title"].lower() for panel in shown), wanted


def test_series_of_a_run_name_its_tenant_and_model(tmp_path):
    store = open_store(str(tmp_path))
    fill(store)
    for family in text_string_to_metric_families(exposition(store, 7).decode()):
        for sample in family.samples:
            if sample.name.startswith("karikomi_run_"):
                assert set(RUN) <= sample.labels.keys(), sample.name
