"""What one pruning stage does to a block: the engine's `BlockWork`, made of the pure functions of the rooms."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn

from cluster.storage import Stored, open_store
from workflows.data.windows import from_parquet
from workflows.models.checkpoint import Checkpoint, block_file, read_block_file
from workflows.models.decoder import Decoder
from workflows.models.state import ModelState
from workflows.pruning import ffn, patterns
from workflows.pruning.refit import refit
from workflows.pruning.solvers import SOLVERS, statistic_for
from workflows.recipe import Solver
from workflows.scoring.gram import add_inputs, damped

FFN_OUTPUT = "mlp.down_proj"
FFN_INPUTS = ("mlp.gate_proj", "mlp.up_proj")

# Read-only arrays come from Ray's object store without a copy; nobody writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class RowChunk:
    """Some rows of one linear; `group` names the input that the linear reads (None when no data is needed)."""

    linear: str
    start: int
    stop: int
    group: str | None


@dataclass
class PruneStage:
    """One stage's work on the blocks of `before`; see `cluster.layerwise.BlockWork`.

    Attributes:
        before: the model that this stage starts from.
        config: the model's config after the stage; differs from `before.config` for structured patterns.
        windows_key: calibration windows in the run's store.
        shard_count: number of calibration shards.
        pattern, sparsity, solver: what is done to each linear.
        dtype, device, threads: how blocks are run; they change bits.
        key_prefix: where finished blocks are written.
    """

    before: ModelState
    config: dict[str, Any]
    windows_key: str
    shard_count: int
    pattern: str
    sparsity: float
    solver: Solver
    dtype: Literal["float32", "bfloat16"]
    device: str
    threads: int
    key_prefix: str

    @property
    def block_count(self) -> int:
        """Blocks of the model."""
        return self.before.block_count

    def setup(self) -> None:
        """Fixes what changes bits: the number of threads, and full fp32 precision on a GPU."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = False

    def units(self) -> list[RowChunk]:
        """Row chunks of all linears of a block; the whole output projection at once for structured removal."""
        linears = self._decoder.linears(0)
        if self.pattern == "ffn":
            return [RowChunk(one.name, 0, one.rows, one.group) for one in linears if one.name == FFN_OUTPUT]
        needs_data = self._statistic != "none"
        return [
            RowChunk(one.name, start, min(start + self.solver.rows, one.rows), one.group if needs_data else None)
            for one in linears
            for start in range(0, one.rows, self.solver.rows)
        ]

    @torch.inference_mode()
    def open_shard(self, shard: int) -> list[torch.Tensor]:
        """Hidden states that enter block 0, one tensor [1, length, width] per window of the shard."""
        own = torch.tensor_split(self._tokens, self.shard_count)[shard]
        return list(self._decoder.embed(own).to(self.device).split(1))

    @torch.inference_mode()
    def advance(self, block: int, finished: Stored, shards: Mapping[int, list[torch.Tensor]]) -> None:
        """Replaces each window's hidden states by what the finished block makes of them."""
        tensors = read_block_file(open_store(self.before.store), finished.key, block)
        module = self._finished_decoder.block(block, tensors)
        for windows in shards.values():
            for number, hidden in enumerate(windows):
                windows[number] = self._finished_decoder.run(block, module, hidden)

    @torch.inference_mode()
    def statistics(
        self, block: int, shards: Mapping[int, list[torch.Tensor]], groups: Sequence[str]
    ) -> Iterator[np.ndarray]:
        """Grams [in, in] fp32 (or their diagonals [in]), shard by shard and group by group."""
        module = self._decoder.block(block)
        linears = {name: cast(nn.Linear, module.get_submodule(name)) for name in groups}
        only_diagonal = self.pattern != "ffn" and self._statistic == "diagonal"
        sums = {
            name: torch.zeros((linear.in_features,) * (1 if only_diagonal else 2), device=self.device)
            for name, linear in linears.items()
        }

        def observe(name: str, inputs: torch.Tensor) -> None:
            if only_diagonal:
                sums[name] += inputs.flatten(0, -2).float().square().sum(0)
            else:
                add_inputs(sums[name], inputs)

        for name, linear in linears.items():
            linear.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for windows in shards.values():
            for total in sums.values():
                total.zero_()
            for hidden in windows:
                self._decoder.run(block, module, hidden)
            for name in groups:
                yield sums[name].cpu().numpy()

    def prepare(self, group: str, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Sums the shards' statistics in shard order; then what the solver makes of the sum, once per input."""
        total = torch.from_numpy(parts[0].copy())
        for part in parts[1:]:
            total += torch.from_numpy(part)
        total = total.to(self.device)
        if self.pattern == "ffn":
            return (total.cpu().numpy(),)
        prepared = SOLVERS[self.solver.name].prepare(total, self.solver.damping)
        if self.solver.refit:
            prepared = (*prepared, damped(total, self.solver.damping))
        return tuple(one.cpu().numpy() for one in prepared)

    def solve(self, block: int, unit: RowChunk, prepared: Sequence[np.ndarray] | None) -> Any:
        """Pruned and repaired rows in the stored type; for `ffn` the kept channels and the repaired projection."""
        stored = Checkpoint(self.before).read_linear_rows(block, unit.linear, unit.start, unit.stop)
        weight = stored.to(device=self.device, dtype=torch.float32)
        shared = tuple(torch.from_numpy(one).to(self.device) for one in prepared or ())
        if self.pattern == "ffn":
            keep = int(self.config["intermediate_size"])
            kept, repaired = ffn.remove_channels(weight, shared[0], keep, self.solver.damping)
            return kept.cpu(), repaired.to(stored.dtype).cpu()
        hessian = shared[-1] if self.solver.refit else None
        solved = SOLVERS[self.solver.name].solve(
            weight, shared if hessian is None else shared[:-1], self.pattern, self.sparsity
        )
        if hessian is not None:
            solved = refit(weight, solved, hessian, self.solver.refit)
        return unit.linear, solved.to(stored.dtype).cpu()

    def assemble(self, block: int, results: Sequence[Any]) -> Stored:
        """Checks the result once more in the stored type, then writes the block."""
        tensors = dict(Checkpoint(self.before).read_block(block))
        if self.pattern == "ffn":
            kept, repaired = results[0]
            tensors[f"{FFN_OUTPUT}.weight"] = repaired
            for linear in FFN_INPUTS:
                for part in ("weight", "bias"):
                    if (name := f"{linear}.{part}") in tensors:
                        tensors[name] = tensors[name][kept]
        else:
            for linear in dict.fromkeys(linear for linear, _ in results):
                weight = torch.cat([rows for name, rows in results if name == linear])
                patterns.verify(weight, self.pattern, self.sparsity)
                tensors[f"{linear}.weight"] = weight
        return open_store(self.before.store).put(
            f"{self.key_prefix}/{block:05d}.safetensors", block_file(block, tensors)
        )

    @property
    def _statistic(self) -> Literal["none", "diagonal", "gram"]:
        return statistic_for(self.solver.name, self.solver.refit)

    @cached_property
    def _tokens(self) -> torch.Tensor:
        """Calibration windows [windows, length], int64."""
        windows = from_parquet(open_store(self.before.store).get(self.windows_key))["calibration"]
        return torch.from_numpy(windows.tokens.astype(np.int64))

    @cached_property
    def _decoder(self) -> Decoder:
        return self._decoder_for(self.before.config)

    @cached_property
    def _finished_decoder(self) -> Decoder:
        return self._decoder_for(self.config)

    def _decoder_for(self, config: dict[str, Any]) -> Decoder:
        checkpoint = Checkpoint(self.before.model_copy(update={"config": config}))
        return Decoder(checkpoint, getattr(torch, self.dtype), self._tokens.shape[1], self.device)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to workers: the fields, not what was made of them."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
