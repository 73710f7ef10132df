"""A pruning stage on a checkpoint of random weights and windows of random tokens, for benchmarks of the engine."""

import json
from pathlib import Path

import numpy as np

from cluster.storage import open_store
from workflows.blockwork import PruneStage
from workflows.data.windows import Windows, to_parquet
from workflows.models.state import ModelState
from workflows.recipe import Solver


def random_stage(
    directory: Path,
    windows: tuple[int, int],
    shards: int,
    pattern: str,
    dtype: str,
    key_prefix: str = "blocks",
    rows: int = Solver().rows,
) -> PruneStage:
    """SparseGPT at 50 % on the model in `directory`/model, on the CPU with one thread; the store is `directory`/store.

    Args:
        directory: holds the model.
        windows: how many calibration windows, and of how many tokens.
        shards: over how many shards they are spread.
        pattern: as in a recipe.
        dtype: in which blocks are run.
        key_prefix: where blocks are written.
        rows: of one unit.
    """
    config = json.loads((directory / "model" / "config.json").read_text())
    store = open_store(str(directory / "store"))
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], windows).astype(np.int32)
    drawn = to_parquet({"calibration": Windows(tokens=tokens, slices=["all"] * len(tokens))})
    model = ModelState(source=str(directory / "model"), source_digest="0" * 64, config=config, store=store.uri)
    return PruneStage(
        before=model,
        dense=model,
        config=config,
        windows_key=store.put("windows.parquet", drawn).key,
        shard_count=shards,
        pattern=pattern,
        sparsity=0.5,
        solver=Solver(name="sparsegpt", rows=rows),
        recovery=None,
        dtype=dtype,
        device="cpu",
        threads=1,
        shares=(),
        norms=None,
        key_prefix=key_prefix,
    )
