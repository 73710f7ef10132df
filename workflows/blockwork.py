"""What one pruning stage does to a block: the engine's `BlockWork`, made of the pure functions of the rooms."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from cluster.storage import Stored, open_store
from workflows.following import PrunedStates, Shard
from workflows.models.checkpoint import Checkpoint, block_file
from workflows.models.families import Family, family_of
from workflows.observing import completed
from workflows.passing import OwnStates
from workflows.pruning import ffn, patterns, recovery
from workflows.pruning.rows import prune_rows
from workflows.pruning.solvers import SOLVERS, statistic_for
from workflows.recipe import Solver
from workflows.scoring.gram import damped

Arrays = dict[str, np.ndarray]

# Read-only arrays come from Ray's object store without a copy; nobody writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class RowChunk:
    """Some rows of one linear; `group` names the input that the linear reads (None when no data is needed)."""

    linear: str
    start: int
    stop: int
    group: str | None


def chunks(rows: int, most: int, tile: int = 1) -> list[tuple[int, int]]:
    """Bounds of as few chunks of rows as may be, of about one size.

    Args:
        rows: of a linear.
        most: rows of a chunk, a multiple of `tile`.
        tile: of so many rows each chunk has a multiple.
    """
    even = math.ceil(rows / math.ceil(rows / most))
    step = math.ceil(even / tile) * tile
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass
class PruneStage(PrunedStates):
    """One stage's work on the blocks of `before`; see `cluster.work.BlockWork`.

    Attributes:
        pattern, sparsity, solver: what is done to each linear.
        shares: share of each linear that goes, by name, one dict per block; empty when it is `sparsity` everywhere.
        key_prefix: where finished blocks are written.
    """

    pattern: str
    sparsity: float
    solver: Solver
    shares: tuple[Mapping[str, float], ...]
    key_prefix: str

    @property
    def rounds(self) -> int:
        """Steps of block recovery."""
        return self.recovery.steps if self.recovery else 0

    def units(self) -> list[RowChunk]:
        """Row chunks of all linears of a block; the whole output projection at once for structured removal."""
        linears = self._decoder.linears(0)
        if self.pattern == "ffn":
            return [
                RowChunk(one.name, 0, one.rows, one.group) for one in linears if one.name == self._family.ffn_output
            ]
        needs_data = self._statistic != "none"
        tile = patterns.parse(self.pattern).tile
        return [
            RowChunk(one.name, start, stop, one.group if needs_data else None)
            for one in linears
            for start, stop in chunks(one.rows, self.solver.rows, tile)
        ]

    def prepare(self, group: str, total: np.ndarray) -> tuple[np.ndarray, ...]:
        """What the solver makes of an input's statistics, once for all who read it."""
        statistic = completed(total, self.device)
        del total  # half a Gram, which nobody holds any more
        if self.pattern == "ffn":
            return (statistic.cpu().numpy(),)
        prepared = SOLVERS[self.solver.name].prepare(statistic, self.solver.damping)
        if self.solver.goes_on:
            prepared = (*prepared, damped(statistic, self.solver.damping))
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
        hessian = shared[-1] if self.solver.goes_on else None
        own = shared if hessian is None else shared[:-1]
        solved = prune_rows(weight, own, hessian, self.pattern, self._share(block, unit.linear), self.solver)
        return unit.linear, solved.to(stored.dtype).cpu()

    def begin(self, block: int, results: Sequence[Any]) -> tuple[Arrays, tuple[Arrays, Arrays]]:
        """The pruned linears' weights (and biases that lost rows with them), fp32, by name, and Adam's moments."""
        weights = {name: one.float() for name, one in self._changed(block, results).items()}
        nothing = _arrays(recovery.no_moment(weights))
        return _arrays(weights), (nothing, nothing)

    def look(self, block: int, number: int, seen: Arrays, shards: Mapping[int, Shard]) -> Iterator[Arrays]:
        """Gradients by name of one window of each shard, in turn."""
        self._want(block, shards)
        rest = Checkpoint(self.before).read_block(block, lambda name: name not in seen)
        tensors = dict(rest) | {name: torch.from_numpy(one) for name, one in seen.items()}
        module = self._finished_decoder.block_of(block, tensors.items())
        weights = {name: module.get_parameter(name).requires_grad_(True) for name in seen}
        for shard in shards.values():
            window = number % len(shard.hidden)
            output = self._finished_decoder.run(block, module, shard.hidden[window])
            gradients = torch.autograd.grad(recovery.distance(output, shard.wanted[window]), list(weights.values()))
            yield _arrays(dict(zip(weights, gradients, strict=True)))

    def refine(
        self, block: int, number: int, seen: Arrays, kept: tuple[Arrays, Arrays], parts: Sequence[Arrays]
    ) -> tuple[Arrays, tuple[Arrays, Arrays]]:
        """A step of Adam down the shards' gradients."""
        assert self.recovery is not None
        weights, (first, second) = recovery.descend(
            self._tensors(seen),
            (self._tensors(kept[0]), self._tensors(kept[1])),
            [self._tensors(part) for part in parts],
            number,
            self.recovery.steps,
            self.recovery.learning_rate,
        )
        return _arrays(weights), (_arrays(first), _arrays(second))

    def assemble(self, block: int, refined: Arrays | None, results: Sequence[Any]) -> Stored:
        """Checks the result once more in the stored type, then writes the block."""
        changed = self._changed(block, results)
        if refined is not None:
            changed |= {name: torch.from_numpy(one).to(changed[name].dtype) for name, one in refined.items()}
        if self.pattern != "ffn":
            for name, weight in changed.items():
                patterns.verify(weight, self.pattern, self._share(block, name.removesuffix(".weight")))
        rest = Checkpoint(self.before).read_block(block, lambda name: name not in changed)
        return open_store(self.before.store).put(
            f"{self.key_prefix}/{block:05d}.safetensors", block_file(self.before.prefix(block), dict(rest) | changed)
        )

    def _share(self, block: int, linear: str) -> float:
        """Share of a linear's weights that goes."""
        return self.shares[block][linear] if self.shares else self.sparsity

    def _changed(self, block: int, results: Sequence[Any]) -> dict[str, torch.Tensor]:
        """In the stored type; the last turn's are those of whole linears, too."""
        if self.pattern != "ffn":
            linears = dict.fromkeys(linear for linear, _ in results)
            return {
                f"{linear}.weight": torch.cat([rows for name, rows in results if name == linear]) for linear in linears
            }
        kept, repaired = results[0]
        inputs = Checkpoint(self.before).read_block(
            block, lambda name: name.rpartition(".")[0] in self._family.ffn_inputs
        )
        return {name: one[kept] for name, one in inputs} | {f"{self._family.ffn_output}.weight": repaired}

    @property
    def _family(self) -> Family:
        return family_of(self.before.config)

    def _tensors(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(one).to(self.device) for name, one in arrays.items()}

    @property
    def _only_diagonal(self) -> bool:
        return self.pattern != "ffn" and self._statistic == "diagonal"

    @property
    def _statistic(self) -> Literal["none", "diagonal", "gram"]:
        return statistic_for(self.solver.name, self.solver.goes_on)


@dataclass
class DensePruneStage(OwnStates, PruneStage):  # type: ignore[misc]  # a stage is given what its own open_shard gave
    """One stage in which every block sees the inputs that it had in `before`; without recovery."""


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: one.float().cpu().numpy() for name, one in tensors.items()}
