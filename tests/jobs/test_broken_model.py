"""A dense model that is broken from the start: one clear refusal, not a gate that nothing could meet."""

import pytest
import yaml
from models_for_tests import write_tiny_model
from safetensors.torch import load_file, save_file
from test_schedules_for_real import job_of, karikomi

from cluster.storage import open_store
from jobs.records import list_runs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights_of_nan_are_bad_input(tmp_path):
    model = write_tiny_model(tmp_path / "model", layers=1)
    path = model / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_of(model, str(tmp_path / "store"))))
    code, shown = karikomi("run", tmp_path / "job.yaml")
    assert code == 2, shown
    assert f"error: model: {model}: its losses on data.evaluation are not finite" in shown
    assert "Look for NaN" in shown
    (run,) = list_runs(open_store(str(tmp_path / "store")), pytest.fail)
    assert (run.last.ended.result, run.last.ended.code) == ("bad input", 2)
