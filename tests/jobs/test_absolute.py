"""Local paths of a job made absolute; addresses, hub ids and profiles' names stay."""

import pytest
import yaml

from cluster.errors import InputError
from jobs.absolute import absolute_paths
from jobs.job import parse_job


def job(**changes):
    content = {
        "name": "chat", "model": "org/chat", "target": {"pattern": "2:4", "sparsity": 0.5}, "publish": {"to": "out"},
    }  # fmt: skip
    return parse_job(yaml.safe_dump(content | changes), "job.yaml")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_there_and_where_it_publishes_become_absolute(here):
    (here / "models").mkdir()
    (here / "text.txt").write_text("words")
    (here / "mine.yaml").write_text("{}")
    data = {
        "calibration": {"source": "text.txt", "part": [0, 0.5]},
        "evaluation": {"source": "text.txt", "part": [0.5, 1]},
    }
    moved, made = absolute_paths(job(model="models", hardware="mine.yaml", data=data))
    assert (moved.model, moved.publish.to) == (f"{here}/models", f"{here}/out")
    assert moved.data.calibration.source == f"{here}/text.txt"
    assert moved.hardware == f"{here}/mine.yaml"
    assert made == tuple(f"{here}/{name}" for name in ("mine.yaml", "models", "out", "text.txt"))
    assert absolute_paths(moved) == (moved, ())


def test_what_is_no_path_stays(here):
    (here / "l4").mkdir()
    one = job(hardware="l4", publish={"to": "s3://models/x"})
    assert absolute_paths(one) == (one, ())
    assert (
        one.model_copy(update={"model": "s3://a/b"}) == absolute_paths(one.model_copy(update={"model": "s3://a/b"}))[0]
    )


def test_home_is_filled_in(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "models").mkdir()
    moved, _ = absolute_paths(job(model="~/models", publish={"to": "~/out"}))
    assert (moved.model, moved.publish.to) == (f"{here}/models", f"{here}/out")
    with pytest.raises(InputError, match="nobody here"):
        absolute_paths(job(publish={"to": "~nobody-at-all/out"}))
