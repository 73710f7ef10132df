"""Schedules with nothing pretended: the command line, a real run, a real release, a real evaluation."""

import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
import yaml
from models_for_tests import write_tiny_model, write_trained_model

from cluster.marks import marks
from cluster.storage import open_store
from jobs import triggers
from jobs.job import Job
from jobs.run_due import run_due
from jobs.schedules import Schedule
from jobs.scheduling import apply
from jobs.starting import edges_here
from workflows.models.source import resolve_source
from workflows.release import find_version

PART = {"source": "builtin:python-docs", "length": 32}
PATIENCE = 900  # on a busy machine


def karikomi(*arguments) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout + done.stderr


def make_old(model: Path) -> Path:
    """As if it had been written a while ago: a model that is still being written is left alone."""
    for file in model.iterdir():
        os.utime(file, (1_700_000_000 + hash(file.stat().st_mtime_ns) % 1000,) * 2)
    return model


def job_of(model: Path, to: str, **changes) -> dict:
    return {
        "name": "tiny",
        "model": str(model),
        "data": {
            "calibration": PART | {"part": [0, 0.3], "windows": 4},
            "tuning": PART | {"part": [0.3, 0.4]},
            "evaluation": PART | {"part": [0.8, 1], "windows": 4},
        },
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "solver": {"name": "magnitude"},
        "gates": {"perplexity_increase": 5.0, "worst_slice_increase": 5.0},
        "traffic": {"prompt_tokens": 16, "output_tokens": 4},
        "cluster": {"workers": 1},
        "publish": {"to": to},
    } | changes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_changed_model_is_compressed_and_the_same_one_is_not(s3, tmp_path):
    """apply, run-due, run-due again, change the model, run-due: as cron would do it."""
    to = f"s3://tests/{uuid.uuid4().hex}"
    model = make_old(write_tiny_model(tmp_path / "model", layers=1))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_of(model, to)))
    plan = tmp_path / "schedule.yaml"
    plan.write_text(
        yaml.safe_dump({"name": "follow", "job": "job.yaml", "when_model_changes": True, "cron": "* * * * *"})
    )
    code, shown = karikomi("schedule", "apply", plan)
    assert (code, "follow is in force" in shown) == (0, True), shown
    code, shown = karikomi("schedule", "run-due", "--from", to)
    assert code == 0, shown
    assert " done: tiny: as many parameters" in shown
    assert find_version(open_store(to), "tiny", None).version == "1"
    code, shown = karikomi("schedule", "run-due", "--from", to)
    assert code == 0, shown
    assert "done:" not in shown
    assert (
        "nothing to do: same model, recipe and data digests as a run before: tiny@1 stands" in shown
        or "nothing is due" in shown
    )
    make_old(write_tiny_model(model, layers=1, seed=1))
    code, shown = karikomi("schedule", "run-due", "--from", to)
    assert code == 0, shown
    assert " done: tiny: as many parameters" in shown
    assert find_version(open_store(to), "tiny", None).version == "2"
    code, shown = karikomi("schedule", "history", "follow", "--from", to)
    assert code == 0
    assert shown.count("model changed") == 2
    assert "nothing to do" in shown
    for command, words in (("pause", "is paused"), ("run-due", "nothing is due"), ("resume", "goes on")):
        name = ["follow"] if command != "run-due" else []
        code, shown = karikomi("schedule", command, *name, "--from", to)
        assert (code, words in shown) == (0, True), shown
    code, shown = karikomi("schedule", "pause", "nobody", "--from", to)
    assert (code, "no schedule nobody" in shown) == (2, True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_release_that_fails_on_fresh_data_is_found(tmp_path):
    """The release is good on the text it was judged by when it was made, and bad on what people write today.

    On signs that it never saw, the dense model is sure of the wrong thing and the pruned one less so; on English it is
    the other way round. Measured: -56 % and +44 %, so that the gate lies far from both.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only wait for each other on a busy machine
    model = write_trained_model(tmp_path / "model", layers=1, steps=150)
    torch.set_num_threads(threads)
    easy = tmp_path / "easy.txt"
    easy.write_text("\n\n".join(["~^|%#" * 32] * 40))
    data = job_of(model, "")["data"] | {"evaluation": PART | {"source": str(easy), "windows": 4}}
    changes = {"data": data, "target": {"pattern": "1:4", "sparsity": 0.75}}
    gates = {"perplexity_increase": 0.1, "worst_slice_increase": 0.1}
    job = job_of(model, str(tmp_path / "store"), gates=gates, **changes)
    parsed = Job.model_validate(job)
    assert triggers.live_verdict(parsed, parsed.data.evaluation) is None, "nothing is published yet"
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    code, shown = karikomi("run", path)
    assert code == 0, shown
    passed, sentence = triggers.live_verdict(parsed, parsed.data.evaluation)
    assert passed, sentence
    assert sentence.startswith(f"tiny@1 on {easy}: perplexity ")
    plan = Schedule.model_validate(
        {
            "name": "watch",
            "job": job,
            "when_gate_fails": {"data": PART | {"part": [0.4, 0.8], "windows": 32}, "check": "* * * * *"},
        }
    )
    store = open_store(job["publish"]["to"])
    apply(store, plan, datetime.now(UTC) - timedelta(minutes=2), "ann")
    (told,) = run_due(store, edges_here(None, None, lambda: False))
    assert told.what == "nothing to do", "the same recipe would make the same release"
    assert "tiny@1 on builtin:python-docs: perplexity rose" in told.sentence
    assert "(limit +10 %)" in told.sentence


def test_a_model_is_read_through_only_when_a_look_says_so(store, tmp_path, monkeypatch):
    model = make_old(write_tiny_model(tmp_path / "model", layers=1))
    plan = Schedule.model_validate({"name": "follow", "job": job_of(model, "s3://b/c"), "when_model_changes": True})
    read = []
    monkeypatch.setattr(triggers, "resolve_source", lambda *a: read.append(a) or resolve_source(*a))
    first = triggers.model_digest(store, plan)
    assert (triggers.model_digest(store, plan), len(read)) == (first, 1)
    config = model / "config.json"
    config.write_text(config.read_text())
    assert (triggers.model_digest(store, plan), len(read)) == (None, 1), "it may still be being written"
    os.utime(config, (1_700_000_500, 1_700_000_500))
    assert (triggers.model_digest(store, plan), len(read)) == (first, 2), "touched is not changed"
    make_old(write_tiny_model(model, layers=1, seed=1))
    assert triggers.model_digest(store, plan) not in (None, first)


def test_marks_change_with_the_content(store):
    store.put("model/a", b"one")
    store.put("model/below/b", b"other")
    place = open_store(f"{store.uri}/model")
    before = marks(place)
    assert list(before) == ["a"]
    assert marks(place) == before
    store.put("model/a", b"two")
    assert marks(place)["a"].mark != before["a"].mark
    assert abs(datetime.now(UTC) - marks(place)["a"].changed) < timedelta(minutes=5)
    assert marks(open_store(f"{store.uri}/nothing")) == {}


@pytest.mark.parametrize("hub", ["org/model", "org/model@main"])
def test_a_hub_model_has_no_marks(hub):
    assert triggers.look(hub) == {}
