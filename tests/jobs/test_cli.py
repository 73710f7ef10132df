"""The command line: help, exit codes, and bad input that leaves no trace."""

import json

import pytest
import yaml
from models_for_tests import write_tiny_model

from cluster.storage import open_store


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "model", layers=1)


def write_job(tmp_path, directory, **changes):
    job = {
        "name": "tiny",
        "model": str(directory),
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "publish": {"to": str(tmp_path / "out")},
        "data": {
            "calibration": {"source": "builtin:python-docs", "part": [0, 0.3], "windows": 4, "length": 32},
            "tuning": {"source": "builtin:python-docs", "part": [0.3, 0.4], "length": 32},
            "evaluation": {"source": "builtin:python-docs", "part": [0.8, 1], "windows": 4, "length": 32},
        },
    } | changes
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def test_help_lists_commands_and_exit_codes(karikomi):
    shown = karikomi("--help")
    assert shown.returncode == 0
    for word in ("run", "plan", "pull", "fields", "75 machines or store lost"):
        assert word in " ".join(shown.stdout.split())
    for command in ("run", "plan", "pull"):
        assert karikomi(command, "--help").returncode == 0


def test_plan_says_what_will_happen_and_writes_nothing(karikomi, tmp_path, model):
    planned = karikomi("plan", write_job(tmp_path, model))
    assert planned.returncode == 0, planned.stderr
    for words in (
        "1 blocks of width 64",
        "Stage 1 of 1: remove 50%",
        "2 workers",
        "Memory of a worker",
        "Next: windows",
    ):
        assert words in planned.stdout
    assert f"to {tmp_path / 'out'}" in planned.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"colour": "red"}, 2, "colour: unknown field"),
        ({"model": "/no/such/model"}, 2, "/no/such/model is not there"),
        ({"target": {"pattern": "5:7", "sparsity": 2 / 7}}, 2, "no multiple of 7"),
        ({"target": {"pattern": "48x48", "sparsity": 0.5}, "solver": {"rows": 48}}, 2, "rows, no multiple of 48"),
        ({"target": {"pattern": "ffn", "sparsity": 0.003}}, 2, "sparsity"),
        ({"hardware": "abacus"}, 2, "no profile abacus; there are: a100-80g, cpu-local, h100-sxm, l4"),
        ({"publish": {"to": "ftp://x"}}, 2, "no kind of store"),
        ({"publish": {"to": "/proc/nowhere"}}, 2, "cannot be written"),
    ],
)
def test_bad_input_is_told_and_leaves_no_trace(karikomi, tmp_path, model, changes, code, message):
    done = karikomi("run", write_job(tmp_path, model, **changes))
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"too short", "gives 0 windows"), (None, "is not there")],
)
def test_bad_data_is_told_and_leaves_no_trace(karikomi, tmp_path, model, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    data = yaml.safe_load(write_job(tmp_path, model).read_text())["data"]
    data["evaluation"] = {"source": str(tmp_path / "text.txt"), "length": 32}
    done = karikomi("run", write_job(tmp_path, model, data=data))
    assert message in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()


def test_unreachable_store_and_wrong_credentials(karikomi, tmp_path, model, s3):
    job = write_job(tmp_path, model, publish={"to": "s3://tests/cli"})
    nowhere = karikomi("run", job, AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    assert (nowhere.returncode, "out of reach" in nowhere.stderr) == (75, True)
    stranger = karikomi("run", job, AWS_SECRET_ACCESS_KEY="wrong")
    assert (stranger.returncode, "refuses" in stranger.stderr) == (2, True)
    assert list(open_store("s3://tests/cli").keys("")) == []


def test_a_version_that_another_run_published_is_refused_before_any_work(karikomi, tmp_path, model):
    store = open_store(str(tmp_path / "out"))
    pointer = {
        "name": "tiny", "version": "gold", "digest": "d" * 64, "run": "tiny-other", "nonce": "n", "created": "c",
        "manifest": {"key": "m", "sha256": "5" * 64, "size": 1}, "karikomi": "0",
    }  # fmt: skip
    store.put("models/tiny/versions/gold.json", json.dumps(pointer).encode())
    job = write_job(tmp_path, model, publish={"to": store.uri, "version": "gold"})
    done = karikomi("run", job)
    assert done.returncode == 2
    assert "tiny@gold exists already, from run tiny-other" in done.stderr
    assert list(store.keys("")) == ["models/tiny/versions/gold.json"]


def test_pull_of_what_is_not_there(karikomi, tmp_path):
    for release in ("nothing", "nothing@3", "../evil"):
        done = karikomi("pull", release, tmp_path / "dir", "--from", tmp_path)
        assert done.returncode == 2
        assert "error:" in done.stderr
    assert not (tmp_path / "dir").exists()
