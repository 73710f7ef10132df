"""Peak memory of a shard worker follows one block, not the model."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from models_for_tests import write_tiny_model

from cluster.layerwise import run_blocks
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.blockwork import PruneStage
from workflows.data.windows import Windows, to_parquet
from workflows.memory import worker_memory
from workflows.models.state import ModelState
from workflows.recipe import Recipe

LAYERS, HIDDEN, FFN, WINDOWS, LENGTH = 40, 768, 2048, 8, 64
MIB = 1 << 20


class Watched(PruneStage):
    """The real work; a thread in each shard worker notes its private memory (without Ray's shared object store)."""

    def open_shard(self, shard):
        self._decoder, self._finished_decoder  # noqa: B018 – code and empty modules belong to the baseline
        if not hasattr(self, "_watch"):
            self._watch = threading.Thread(target=self._look, args=(private_memory(),), daemon=True)
            self._watch.start()
        return super().open_shard(shard)

    def _look(self, baseline: int) -> None:
        peak = 0
        while True:
            now = private_memory() - baseline
            if now > peak:
                peak = now
                whole = Path(self.before.store) / f"peak-{os.getpid()}"
                part = whole.with_name(f"part-{os.getpid()}")
                part.write_text(str(peak))
                part.replace(whole)  # the worker may be killed at any moment
            threading.Event().wait(0.002)


def private_memory() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "ffn"])
def test_a_worker_holds_one_block_not_the_model(tmp_path, pattern):
    directory = write_tiny_model(tmp_path / "model", "llama", layers=LAYERS, hidden=HIDDEN, ffn=FFN)
    config = json.loads((directory / "config.json").read_text())
    store = open_store(str(tmp_path / "store"))
    tokens = np.random.default_rng(0).integers(4, config["vocab_size"], (WINDOWS, LENGTH)).astype(np.int32)
    windows = store.put("w.parquet", to_parquet({"calibration": Windows(tokens=tokens, slices=["all"] * WINDOWS)}))
    recipe = Recipe.model_validate(
        {
            "model": str(directory),
            "target": {"pattern": pattern, "sparsity": 0.5},
            "solver": {"name": "wanda"},
            "data": {
                "calibration": {"source": "a.txt", "windows": WINDOWS, "length": LENGTH},
                "shards": 2,
            },
        }
    )
    dense = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=store.uri)
    stage = Watched(
        before=dense,
        dense=dense,
        config=config | ({"intermediate_size": FFN // 2} if pattern == "ffn" else {}),
        windows_key=windows.key,
        shard_count=recipe.data.shards,
        pattern=pattern,
        sparsity=0.5,
        solver=recipe.solver,
        recovery=None,
        dtype="float32",
        device="cpu",
        threads=1,
        shares=(),
        norms=None,
        key_prefix="blocks",
    )
    with session(ClusterSpec(), cpus=2):
        blocks = run_blocks(stage, ClusterSpec(workers=2), 1, [], lambda block, stored: None, lambda: False)
    assert len(blocks) == LAYERS
    peaks = [int(file.read_text()) for file in (tmp_path / "store").glob("peak-*")]
    assert len(peaks) == 2
    memory = worker_memory(config, recipe, ClusterSpec(workers=2))
    model = LAYERS * memory.block
    print(
        f"{pattern}: peaks {[p // MIB for p in peaks]} MiB, bound {memory.peak // MIB} MiB (block {memory.block / MIB:.1f}, "
        f"activations {memory.activations / MIB:.1f}, Grams {memory.grams / MIB:.1f}), blocks of the model {model // MIB} MiB"
    )
    assert max(peaks) <= memory.peak
