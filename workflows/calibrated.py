"""What work on a model's blocks over calibration shards shares: its windows, its blocks, and how they are run."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from cluster.storage import Stored, open_store
from workflows.data.windows import from_parquet
from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder
from workflows.models.state import ModelState
from workflows.recipe import Recipe


@dataclass
class Calibrated:
    """The base of what the engines are handed; see `cluster.layerwise.ShardedWork`.

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

    def _of_shard(self, shard: int) -> torch.Tensor:
        """A shard's windows [windows, length], int64."""
        return torch.tensor_split(self._tokens, self.shard_count)[shard]

    @cached_property
    def _tokens(self) -> torch.Tensor:
        """Calibration windows [windows, length], int64."""
        windows = from_parquet(open_store(self.before.store).get(self.windows_key))["calibration"]
        return torch.from_numpy(windows.tokens.astype(np.int64))

    @cached_property
    def _decoder(self) -> Decoder:
        return self._decoder_for(self.before)

    @torch.no_grad()
    def _decoder_for(self, state: ModelState) -> Decoder:
        return Decoder(Checkpoint(state), getattr(torch, self.dtype), self._tokens.shape[1], self.device)

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
