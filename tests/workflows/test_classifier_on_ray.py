"""A classifier on a real Ray: the same bytes on any number of workers, every allocation policy."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from classifiers_for_tests import sentences, word_tokenizer, write_trained_classifier

from cluster.layerwise import run_blocks
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.allocating import Allocating
from workflows.blockwork import PruneStage
from workflows.data.windows import Windows, to_parquet
from workflows.models.checkpoint import Checkpoint
from workflows.models.state import ModelState
from workflows.recipe import Recipe, Recovery, Solver
from workflows.steps import Journal

TEXTS, SHARDS, TARGET = 12, 3, 0.5

pytestmark = [pytest.mark.usefixtures("embedded_ray"), pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    directory = write_trained_classifier(path / "model", steps=200)
    config = json.loads((directory / "config.json").read_text())
    return ModelState(source=str(directory), source_digest="0" * 64, config=config, store=str(path / "store"))


@pytest.fixture(scope="module")
def windows(model):
    rows = sentences(TEXTS, 3)
    tokens = [np.array(one, dtype=np.int32) for one in word_tokenizer()([text for text, *_ in rows])["input_ids"]]
    one = Windows(tokens=tokens, slices=["all"] * TEXTS, labels=[label for _, label, _ in rows])
    return open_store(model.store).put("windows", to_parquet({"calibration": one, "tuning": one}))


def pruned(model, windows, workers: int, place: str, recovery: Recovery | None = None) -> list:
    stage = PruneStage(
        before=model, dense=model, config=model.config, windows_key=windows.key, shard_count=SHARDS, pattern="2:4",
        sparsity=0.5, solver=Solver(rows=24), recovery=recovery, dtype="float32", device="cpu", threads=1, shares=(),
        norms=None, key_prefix=place,
    )  # fmt: skip
    return run_blocks(stage, ClusterSpec(workers=workers, wait_seconds=60), 1, [], lambda *_: None, lambda: False)


def test_the_same_bytes_on_any_number_of_workers(model, windows):
    one, three = (pruned(model, windows, workers, f"w{workers}", Recovery(steps=2)) for workers in (1, 3))
    assert [block.sha256 for block in one] == [block.sha256 for block in three]


def shares_by(model, windows, allocation, run: str, workers: int = 2):
    part = {"source": "a.tsv", "label": "label", "length": 16}
    roles = {
        "calibration": part | {"windows": TEXTS},
        "tuning": part | {"source": "b.tsv"},
        "evaluation": part | {"source": "c.tsv"},
    }
    recipe = Recipe.model_validate(
        {
            "model": model.source,
            "data": roles | {"shards": SHARDS},
            "target": {"pattern": "unstructured", "sparsity": TARGET},
            "allocation": allocation,
        }
    )
    journal = Journal(open_store(model.store), run, lambda event: None)
    spec = ClusterSpec(workers=workers, wait_seconds=60, spill_above_gib=0)
    how = {"windows": windows.sha256}
    return Allocating(recipe, spec, journal, lambda: None, lambda: False, 1, model, windows, TARGET, how).shares()


SEARCH = {"policy": "evolve", "windows": 4, "generations": 2, "children": 3}


@pytest.mark.parametrize("allocation", ["owl", "composite", {"policy": "measured", "windows": 4}, SEARCH], ids=str)
def test_every_allocation_meets_the_target(model, windows, allocation):
    shares = shares_by(model, windows, allocation, "policies")
    sizes = {name: np.prod(shape) for name, shape in Checkpoint(model).shapes().items()}
    weights = {
        f"bert.encoder.layer.{block}.{name}.weight": share
        for block, own in enumerate(shares)
        for name, share in own.items()
    }
    assert len(weights) == 2 * 6
    total = sum(sizes[name] for name in weights)
    assert sum(sizes[name] * share for name, share in weights.items()) / total == pytest.approx(TARGET, abs=1e-9)
    assert max(weights.values()) - min(weights.values()) > 0.01


def test_a_search_is_the_same_on_one_worker_and_its_table_counts_texts(model, windows):
    assert shares_by(model, windows, SEARCH, "alone", 1) == shares_by(model, windows, SEARCH, "policies", 2)
    table = pq.read_table(pa.BufferReader(open_store(model.store).get("runs/alone/scores/1.parquet")))
    assert table.schema.metadata[b"predicted"] == str(TEXTS).encode()
    query = [row for row in table.to_pylist() if row["linear"] == "attention.self.query" and row["part"] is not None]
    assert [row["row_start"] for row in query if row["block"] == 0] == [0, 8, 16, 24], "a part is a head"
