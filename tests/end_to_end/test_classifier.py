"""A classifier, the whole way from its job file: pruned, tuned, judged by accuracy, published, pulled and loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from classifiers_for_tests import sentences, write_sentences, write_trained_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.storage import open_store
from workflows.release import find_version

PATIENCE = 900  # seconds after which a command that should have ended has hung
pytestmark = pytest.mark.timeout(2 * PATIENCE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_trained_classifier(tmp_path_factory.mktemp("classifier") / "model")


def write_job(folder: Path, model: Path, **changes) -> Path:
    table = write_sentences(folder / "sentences.tsv", 600)
    part = {"source": str(table), "text": "sentence", "label": "label", "length": 16}
    job = {
        "name": "mood",
        "model": str(model),
        "data": {
            "calibration": part | {"part": [0, 0.3], "windows": 64},
            "tuning": part | {"part": [0.3, 0.7]},
            "evaluation": part | {"part": [0.7, 1], "slice": "kind"},
        },
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "stages": [{"sparsity": 0.5, "tune": {"steps": 6, "batch": 4, "ranks": 2, "learning_rate": 0.001}}],
        "gates": {"accuracy_drop": 0.1, "worst_slice_drop": 0.2},
        "traffic": {"prompt_tokens": 16},
        "publish": {"to": str(folder / "store")},
    } | changes
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def karikomi(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.slow
def test_from_the_job_file_to_the_pulled_release(model, tmp_path):
    job, store = write_job(tmp_path, model), tmp_path / "store"
    code, planned = karikomi("plan", job)
    assert code == 0, planned
    assert "gate: accuracy at most 10 points lower, worst slice at most 20" in planned
    code, shown = karikomi("run", job)
    assert code == 0, shown
    for words in ("accuracy", "macro-F1", "slice long", "texts a second", "points"):
        assert words in shown
    assert "perplexity" not in shown
    assert "decode" not in shown
    code, said = karikomi("pull", "mood@1", tmp_path / "release", "--from", store)
    assert code == 0, said
    loaded, notes = AutoModelForSequenceClassification.from_pretrained(tmp_path / "release", output_loading_info=True)
    assert not any(notes.values()), notes
    for layer in loaded.bert.encoder.layer:
        for linear in [one for one in layer.modules() if isinstance(one, torch.nn.Linear)]:
            groups = linear.weight.reshape(linear.weight.shape[0], -1, 4)
            assert int((groups != 0).sum(-1).max()) <= 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "release")
    fresh = sentences(200, seed=9)
    inputs = tokenizer([text for text, *_ in fresh], padding=True, return_tensors="pt")
    right = loaded.eval()(**inputs).logits.argmax(1) == torch.tensor([label for _, label, _ in fresh])
    assert right.float().mean() > 0.8
    report = json.loads((tmp_path / "release" / "REPORT.json").read_text())
    assert report["history"][0]["verdict"]["measure"] == "accuracy"
    page = (tmp_path / "release" / "REPORT.html").read_text()
    assert "accuracy pruned" in page
    assert "perplexity" not in page
    assert "output tokens" not in page
    metrics = set(pq.read_table(tmp_path / "release" / "REPORT.parquet")["metric"].to_pylist())
    assert {"accuracy", "macro_f1", "mean_loss", "classify_speedup"} <= metrics
    assert not any("perplexity" in one or "decode" in one for one in metrics)
    _, listed = karikomi("models", "--from", store)
    assert "accuracy" in listed
    assert "points" in listed
    (row,) = pq.read_table(store / "ledger", partitioning="hive").to_pylist()
    assert row["accuracy_drop"] is not None
    assert row["perplexity_increase"] is None
    _, exported = karikomi("metrics", "--from", store)
    assert "karikomi_run_gate_accuracy_drop{" in exported
    assert "karikomi_run_gate_perplexity_increase{" not in exported
    code, again = karikomi("run", job)
    assert code == 0, again
    assert again.count("was done") == 9, "something was done twice"


def test_a_failed_accuracy_gate_publishes_the_last_good_stage(model, tmp_path):
    job = write_job(
        tmp_path,
        model,
        target={"pattern": "unstructured", "sparsity": 0.97},
        solver={"name": "magnitude"},
        stages=[{"sparsity": 0.1}, {"sparsity": 0.97}],
        gates={"accuracy_drop": 0.05, "worst_slice_drop": 0.1},
    )
    code, shown = karikomi("run", job)
    assert code == 3, shown
    words = " ".join(shown.split())
    assert "Stage 2 of 2 missed its gate (accuracy fell" in words
    assert "stage 1 is published instead" in words
    pointer = find_version(open_store(str(tmp_path / "store")), "mood", None)
    (report,) = (tmp_path / f"store/models/mood/{pointer.digest[:12]}").glob("REPORT.*.json")
    size = json.loads(report.read_text())["compressed_size"]
    assert size["zeros"] / size["block_parameters"] == pytest.approx(0.1, abs=1e-3)


def test_what_does_not_fit_is_refused_before_any_work(model, tmp_path):
    job = write_job(tmp_path, model)
    fields = yaml.safe_load(job.read_text())
    fields["data"]["tuning"] |= {"length": 128}
    job.write_text(yaml.safe_dump(fields))
    code, said = karikomi("plan", job)
    assert code == 2
    assert "data.tuning.length: 128 tokens, but the model has positions for 64" in " ".join(said.split())
