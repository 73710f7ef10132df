"""What work on a model's blocks over calibration shards shares: its windows, its blocks, and how they are run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from cluster.storage import Stored, open_store
from workflows.data.windows import Windows, from_parquet
from workflows.models.blocks import Blocks
from workflows.models.opening import open_blocks
from workflows.models.state import ModelState
from workflows.recipe import Recipe


@dataclass
class Calibrated:
    """The base of what the engines are handed; see `cluster.work.ShardedWork`.

    Attributes:
        before: the model.
        windows_key: calibration windows in the run's store.
        shard_count: number of calibration shards.
        dtype, device, threads: how blocks are run; they change bits.
    """

    before: ModelState
    windows_key: str
    shard_count: int
    dtype: Literal["float32", "bfloat16"]
    device: str
    threads: int

    @property
    def block_count(self) -> int:
        """Blocks of the model."""
        return self.before.block_count

    def setup(self) -> None:
        """Fixes what changes bits: the number of threads, and full fp32 precision on a GPU."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = False

    def _of_shard(self, shard: int) -> list[int]:
        """Numbers of a shard's windows: as many as any other shard has, give or take one."""
        return list(np.array_split(np.arange(len(self._tokens)), self.shard_count)[shard])

    @torch.no_grad()
    def _entering(self, windows: Sequence[int]) -> list[torch.Tensor]:
        """Hidden states that enter block 0, one [1, length, width] for each of some windows."""
        return self._decoder.embed([self._tokens[window] for window in windows])

    def _wanted(self, window: int) -> torch.Tensor:
        """What a window should predict: its own tokens [length], or a sentence's class []; int64, on the device."""
        return torch.from_numpy(self._windows.wanted(window)).to(self.device)

    @property
    def token_count(self) -> int:
        """Calibration tokens."""
        return sum(map(len, self._tokens))

    @cached_property
    def _windows(self) -> Windows:
        return from_parquet(open_store(self.before.store).get(self.windows_key))["calibration"]

    @cached_property
    def _tokens(self) -> torch.Tensor | list[torch.Tensor]:
        """Calibration windows [windows, length], int64; of labelled sentences a list, each [its own length]."""
        rows = [torch.from_numpy(row.astype(np.int64)) for row in self._windows.tokens]
        return torch.stack(rows) if self._windows.labels is None else rows

    @cached_property
    def _decoder(self) -> Blocks:
        return self._decoder_for(self.before)

    @torch.no_grad()
    def _decoder_for(self, state: ModelState) -> Blocks:
        return open_blocks(state, getattr(torch, self.dtype), max(map(len, self._tokens)), self.device)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to workers: the fields, not what was made of them."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


def as_asked(recipe: Recipe, before: ModelState, windows: Stored) -> dict[str, Any]:
    """The fields of `Calibrated` as a recipe has them, for a model and the windows of all roles."""
    return {
        "before": before,
        "windows_key": windows.key,
        "shard_count": recipe.data.shards,
        "dtype": recipe.dtype,
        "device": recipe.device,
        "threads": recipe.threads,
    }
