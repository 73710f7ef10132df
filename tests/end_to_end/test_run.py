"""The whole way, as a user goes it: the command line, a real Ray, real DeepSpeed ranks, a real S3 server."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import Cancelled
from cluster.storage import open_store
from workflows.release import find_version

PART = {"source": "builtin:python-docs", "length": 64}
STEPS_OF_A_RUN = 9  # windows, evaluate, prune, evaluate, tune, evaluate, format, measure, publish
PRUNING = GRADIENTS = 2  # the steps done before
PATIENCE = 240  # seconds after which a run that should have ended has hung


def write_job(directory: Path, model: Path, to: str, **changes) -> Path:
    job = {
        "name": "tiny",
        "model": str(model),
        "data": {
            "calibration": PART | {"part": [0, 0.2], "windows": 8},
            "tuning": PART | {"part": [0.2, 0.6]},
            "evaluation": PART | {"part": [0.8, 1], "windows": 8, "slice": "kind"},
        },
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "stages": [{"sparsity": 0.5, "tune": {"steps": 3, "ranks": 2, "learning_rate": 0.001, "batch": 4}}],
        "gates": {"perplexity_increase": 1.0, "worst_slice_increase": 1.0},
        "traffic": {"prompt_tokens": 32, "output_tokens": 8},
        "publish": {"to": to},
    } | changes
    path = directory / f"job-{uuid.uuid4().hex[:6]}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def start(job: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", str(job)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(job: Path) -> tuple[int, str]:
    process = start(job)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out + err


def records(to: str) -> dict[str, dict]:
    store = open_store(to)
    return {key: store.get_json(key) for key in store.keys("runs/") if "/steps/" in key}


@pytest.fixture(scope="module")
def undisturbed(s3, trained_model, tmp_path_factory):
    """One run from start to end, to S3; the others are held against its digest."""
    directory = tmp_path_factory.mktemp("undisturbed")
    to = f"s3://tests/{uuid.uuid4().hex}"
    job = write_job(directory, trained_model, to)
    code, shown = run(job)
    assert code == 0, shown
    return {"job": job, "to": to, "shown": shown, "digest": find_version(open_store(to), "tiny", None).digest}


def test_a_release_is_stock_sparse_and_verified(undisturbed, tmp_path):
    target = tmp_path / "release"
    command = [sys.executable, "-m", "jobs.cli", "pull", "tiny@1", str(target), "--from", undisturbed["to"]]
    pulled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert pulled.returncode == 0, pulled.stderr
    loaded, notes = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(notes.values()), notes
    for layer in loaded.model.layers:
        for linear in [one for one in layer.modules() if isinstance(one, torch.nn.Linear)]:
            groups = linear.weight.reshape(linear.weight.shape[0], -1, 4)
            assert int((groups != 0).sum(-1).max()) <= 2
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert loaded.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=4).shape[1] >= 5
    report = json.loads((target / "REPORT.json").read_text())
    assert report["model_digest"] == undisturbed["digest"]
    assert report["compressed_size"]["zeros"] * 2 == report["compressed_size"]["block_parameters"]
    assert report["compressed_size"]["compact_bytes"] < report["compressed_size"]["weight_bytes"]
    page = (target / "REPORT.html").read_text()
    assert "<svg" in page
    assert 'src="' not in page
    assert 'href="http' not in page
    metrics = pq.read_table(target / "REPORT.parquet")["metric"].to_pylist()
    assert {"perplexity", "prefill_speedup", "cost_per_million_tokens"} <= set(metrics)


def test_the_terminal_shows_the_table_and_where_it_is(undisturbed):
    for words in ("perplexity", "slice statements", "tokens a second", "peak memory", "Release: tiny@1 at s3://tests/"):
        assert words in undisturbed["shown"]


def test_running_again_does_nothing_again(undisturbed):
    before = records(undisturbed["to"])
    code, shown = run(undisturbed["job"])
    assert code == 0, shown
    assert records(undisturbed["to"]) == before
    assert shown.count("was done") == STEPS_OF_A_RUN == len(before)


@pytest.mark.slow
def test_a_searched_allocation_leads_to_a_release_that_meets_the_target(trained_model, tmp_path):
    to = str(tmp_path / "out")
    job = write_job(
        tmp_path,
        trained_model,
        to,
        target={"pattern": "unstructured", "sparsity": 0.5},
        allocation={"policy": "evolve", "generations": 2, "children": 2, "windows": 2},
        stages=[{"sparsity": 0.5}],
        gates={"perplexity_increase": 9.0, "worst_slice_increase": 9.0},
    )
    code, shown = run(job)
    assert code == 0, shown
    command = [sys.executable, "-m", "jobs.cli", "pull", "tiny@1", str(tmp_path / "release"), "--from", to]
    subprocess.run(command, check=True, capture_output=True)
    size = json.loads((tmp_path / "release" / "REPORT.json").read_text())["compressed_size"]
    assert size["zeros"] / size["block_parameters"] == pytest.approx(0.5, abs=1e-3)
    shares = [
        share
        for one in records(to).values()
        if one["step"] == "allocate"
        for block in one["result"]["shares"]
        for share in block.values()
    ]
    assert max(shares) - min(shares) > 0.02
    (table,) = [key for key in open_store(to).keys("runs/") if key.endswith("scores/1.parquet")]
    assert pq.read_table(io.BytesIO(open_store(to).get(table))).num_rows > len(shares)


@pytest.mark.slow
def test_weighed_tokens_lead_to_the_same_release_when_the_driver_dies_in_their_gradient_pass(trained_model, tmp_path):
    digests = []
    for workers in (2, 1):
        to = tmp_path / f"{workers}"
        weighed = {"token_weights": "gradient", "stages": [{"sparsity": 0.5}]}
        job = write_job(tmp_path, trained_model, str(to), cluster={"workers": workers}, **weighed)
        if workers == 1:
            process, deadline = start(job), time.monotonic() + PATIENCE
            while len(list(to.glob("runs/*/steps/*.json"))) < GRADIENTS and process.poll() is None:
                assert time.monotonic() < deadline, "the run hangs"
                time.sleep(0.005)
            process.kill()
            process.communicate(timeout=PATIENCE)
            assert len(records(str(to))) == GRADIENTS
        code, shown = run(job)
        assert code == 0, shown
        steps = [one["step"] for one in records(str(to)).values()]
        assert steps.count("gradients") == steps.count("prune") == 1
        digests.append(find_version(open_store(str(to)), "tiny", "1").digest)
        assert not list(to.glob("runs/*/scores/*.parquet")), "nobody asked for a table"
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_digest_on_other_numbers_of_workers(undisturbed, trained_model, tmp_path, workers):
    job = write_job(tmp_path, trained_model, str(tmp_path / "out"), cluster={"workers": workers})
    code, shown = run(job)
    assert code == 0, shown
    assert find_version(open_store(str(tmp_path / "out")), "tiny", "1").digest == undisturbed["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("steps_done", [[PRUNING, 4, 8], range(STEPS_OF_A_RUN)], ids=["some", "every"])
def test_the_same_digest_when_the_driver_dies_and_one_worker_is_left(undisturbed, trained_model, tmp_path, steps_done):
    """Stopped by SIGTERM while it prunes, which drains; killed without a word in the other steps."""
    to = tmp_path / "out"
    job = write_job(tmp_path, trained_model, str(to), cluster={"workers": 1})
    first_seen: dict[str, float] = {}
    ends = []
    for done in steps_done:
        process = start(job)
        shown: list[str] = []
        reader = threading.Thread(target=lambda p=process, told=shown: told.extend(p.communicate()), daemon=True)
        reader.start()
        deadline = time.monotonic() + PATIENCE
        # The next step begins as soon as the one before it is recorded.
        while not reached(to, done) and process.poll() is None:
            assert time.monotonic() < deadline, "the run hangs"
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM if done == PRUNING else signal.SIGKILL)
        ends.append(process.wait(PATIENCE))
        reader.join(PATIENCE)
        if done == PRUNING:
            assert ends[-1] == Cancelled.exit_code, shown
            assert "stopping after the piece of work at hand" in shown[1]
        for path in to.glob("runs/*/steps/*.json"):
            first_seen.setdefault(path.name, path.stat().st_mtime_ns)
    assert ends.count(-signal.SIGKILL) >= len(steps_done) - 2, "too few were struck in time"
    code, told = run(job)
    assert code == 0, told
    assert find_version(open_store(str(to)), "tiny", "1").digest == undisturbed["digest"]
    for path in to.glob("runs/*/steps/*.json"):
        assert first_seen.get(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, (
            "a finished step ran again"
        )


def reached(to: Path, steps_done: int) -> bool:
    if steps_done == PRUNING:  # after its first block
        return any(to.glob("runs/*/blocks/*/00000.json"))
    return len(list(to.glob("runs/*/steps/*.json"))) >= steps_done and to.exists()


@pytest.mark.slow
def test_a_failed_gate_publishes_the_last_good_stage_and_says_so(trained_model, tmp_path):
    to = str(tmp_path / "out")
    job = write_job(
        tmp_path,
        trained_model,
        to,
        target={"pattern": "ffn", "sparsity": 0.9375},
        stages=[
            {"sparsity": 0.0625},
            {"sparsity": 0.9375, "tune": {"steps": 1, "retry_steps": 1, "learning_rate": 1e-6}},
        ],
        gates={"perplexity_increase": 0.1, "worst_slice_increase": 0.2},
    )
    code, shown = run(job)
    assert code == 3, shown
    words = " ".join(shown.split())
    assert "Stage 2 of 2 missed its gate" in words
    assert "stage 1 is published instead" in words
    pointer = find_version(open_store(to), "tiny", None)
    config = json.loads((Path(to) / f"models/tiny/{pointer.digest[:12]}/config.json").read_text())
    assert config["intermediate_size"] == 120
    assert sum(record["step"] == "tune" for record in records(to).values()) == 2, "the budget was not used"


@pytest.mark.slow
def test_no_good_stage_publishes_nothing(trained_model, tmp_path):
    to = str(tmp_path / "out")
    gates = {"perplexity_increase": 0.01, "worst_slice_increase": 0.01}
    target = {"pattern": "unstructured", "sparsity": 0.98}
    job = write_job(tmp_path, trained_model, to, target=target, stages=[], solver={"name": "magnitude"}, gates=gates)
    code, shown = run(job)
    assert code == 3, shown
    assert "Nothing was published" in shown
    assert not (tmp_path / "out" / "models").exists()


@pytest.mark.slow
def test_compact_releases_are_small_on_the_way_and_stock_after_it(undisturbed, trained_model, tmp_path):
    to = str(tmp_path / "out")
    job = write_job(tmp_path, trained_model, to, format="compact", stages=[])
    code, shown = run(job)
    assert code == 0, shown
    command = [sys.executable, "-m", "jobs.cli", "pull", "tiny", str(tmp_path / "release"), "--from", to]
    assert subprocess.run(command, check=False, env=os.environ).returncode == 0
    pointer = find_version(open_store(to), "tiny", None)
    sent = Path(to) / f"models/tiny/{pointer.digest[:12]}/model-block-00000.safetensors"
    here = tmp_path / "release" / "model-block-00000.safetensors"
    assert sent.stat().st_size < 0.7 * here.stat().st_size
    _, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "release", output_loading_info=True)
    assert not any(notes.values()), notes
