"""What one scoring pass does to a block: the engine's `BlockWork` that changes nothing and writes what it found.

The model's own blocks run, one after the other, and their inputs are gathered on the way: one pass over the windows.

Where tokens are weighed in pruning they are weighed here, too: an allocation then measures what pruning minimises.
Weights have mean 1, and stand for how (∂L/∂y_o)² goes with x_t x_tᵀ, so costs stay in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from cluster.storage import Stored, open_store
from workflows.blockwork import RowChunk, chunks
from workflows.gradient_files import read_gammas
from workflows.level_files import level_file
from workflows.models.checkpoint import Checkpoint
from workflows.observing import completed
from workflows.passing import OwnStates
from workflows.pruning import patterns
from workflows.pruning.solvers import SOLVERS
from workflows.recipe import Solver
from workflows.score_table import rows_of_head, score_linear
from workflows.scoring.saliency import inverse_diagonal
from workflows.scoring.spread import Spread

PERCENT = [one / 100 for one in range(101)]
OUTLIER = 5.0  # times the mean, as published for OWL (Yin et al. 2023)


class LinearScores(BaseModel):
    """What an allocation needs of one linear.

    Attributes:
        weights: how many there are.
        zeros: how many are zero already.
        curve: saliency below which 0, 1, … 100 % of the weights lie; empty without a gradient pass.
        costs: at each level that was tried, what the loss over the calibration tokens is expected to gain, in nats.
    """

    model_config = ConfigDict(frozen=True)

    weights: int
    zeros: int
    curve: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()


class BlockScores(BaseModel):
    """What a scoring pass found in one block; the engine's object for it.

    Attributes:
        linears: by name, in the order in which the block uses them.
        outliers: share of the Wanda scores |w_oi| · √G_ii that are above `OUTLIER` times their mean.
        levels: the linears as they are at each level that was tried; see `workflows.level_files`.
        rows: lines of the saliency table, see `workflows.score_table`; none without a gradient pass.
    """

    model_config = ConfigDict(frozen=True)

    linears: dict[str, LinearScores]
    outliers: float
    levels: Stored | None
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class WholeLinear:
    """A linear that is scored."""

    linear: str
    group: str


@dataclass(frozen=True)
class Scored:
    """What `solve` finds of a whole linear."""

    linear: str
    scores: LinearScores
    wanda: Spread
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Tried:
    """What `solve` finds of some rows: at each level the rows themselves, in the stored type, and what they cost."""

    linear: str
    rows: list[Tensor]
    costs: np.ndarray


@dataclass
class ScoreStage(OwnStates):
    """A scoring pass over the blocks of `before`; see `cluster.work.BlockWork`.

    Attributes:
        gammas: Γ of every linear, from `workflows.gradient_files.put_gradients`; None: only inputs are looked at.
        levels: shares at which every linear is pruned, to see what it costs; rising, may be empty; needs `gammas`.
        solver: prunes them.
        key_prefix: where each block's scores are written.
    """

    gammas: Stored | None
    levels: tuple[float, ...]
    solver: Solver
    key_prefix: str
    rounds = 0

    def units(self) -> list[WholeLinear | RowChunk]:
        """Every linear as a whole to be scored, and in chunks of rows to be pruned."""
        linears = self._decoder.linears(0)
        return [WholeLinear(one.name, one.group) for one in linears] + [
            RowChunk(one.name, start, stop, one.group)
            for one in (linears if self.levels else ())
            for start, stop in chunks(one.rows, self.solver.rows)
        ]

    def prepare(self, group: str, total: np.ndarray) -> tuple[np.ndarray, ...]:
        """The Gram (or its diagonal); then the diagonal of the inverse, and what the solver makes of the Gram."""
        statistic = completed(total, self.device)
        del total  # half a Gram, which nobody holds any more
        found: list[Tensor] = [statistic]
        if self.gammas is not None:
            found.append(inverse_diagonal(statistic, self.solver.damping))
        if self.levels:
            found += SOLVERS[self.solver.name].prepare(statistic, self.solver.damping)
        return tuple(one.cpu().numpy() for one in found)

    def solve(self, block: int, unit: WholeLinear | RowChunk, prepared: Sequence[np.ndarray]) -> Scored | Tried:
        """Scores a linear, or prunes some of its rows at every level."""
        shared = [torch.from_numpy(one).to(self.device) for one in prepared]
        gamma = None
        if self.gammas is not None:
            gamma = read_gammas(self.before.store, self.gammas.key, block)[unit.linear].to(self.device)
        if isinstance(unit, WholeLinear):
            return self._score(block, unit.linear, shared, gamma)
        assert gamma is not None
        return self._try(block, unit, shared[0], tuple(shared[2:]), gamma[unit.start : unit.stop])

    @property
    def _only_diagonal(self) -> bool:
        return self.gammas is None

    def _score(self, block: int, linear: str, shared: Sequence[Tensor], gamma: Tensor | None) -> Scored:
        (_, weight), *_ = Checkpoint(self.before).read_block(block, lambda name: name == f"{linear}.weight")
        weight = weight.to(self.device)
        squares = shared[0] if shared[0].dim() == 1 else shared[0].diagonal()
        wanda = Spread.of(weight.float().abs().mul_(squares.clamp(min=0).sqrt()))
        zeros = patterns.zeros(weight)
        if gamma is None:
            return Scored(linear, LinearScores(weights=weight.numel(), zeros=zeros), wanda, [])
        trace = float(squares.double().sum())
        heads = rows_of_head(linear, self.before.config)
        found = score_linear(block, linear, weight, gamma, shared[1], trace, heads)
        curve = tuple(found.spread.quantiles(PERCENT).tolist())
        return Scored(linear, LinearScores(weights=weight.numel(), zeros=zeros, curve=curve), wanda, found.rows)

    def _try(self, block: int, unit: RowChunk, gram: Tensor, prepared: tuple[Tensor, ...], gamma: Tensor) -> Tried:
        """Expected gain of the loss by level: ½ Σ_o Γ_o · (w_o − w₀_o) G (w_o − w₀_o)ᵀ."""
        stored = Checkpoint(self.before).read_linear_rows(block, unit.linear, unit.start, unit.stop)
        dense = stored.to(device=self.device, dtype=torch.float32)
        rows, costs = [], []
        for level in self.levels:
            pruned = SOLVERS[self.solver.name].solve(dense, prepared, "unstructured", level).to(stored.dtype)
            change = pruned.float() - dense
            costs.append(float(((change @ gram) * change).sum(1).double() @ gamma.double()) / 2)
            rows.append(pruned.cpu())
        return Tried(unit.linear, rows, np.array(costs))

    def assemble(self, block: int, refined: None, results: Sequence[Scored | Tried]) -> Stored:
        """Writes the linears at every level, then the block's scores."""
        store, place = open_store(self.before.store), f"{self.key_prefix}/{block:05d}"
        scored = [one for one in results if isinstance(one, Scored)]
        tried: dict[str, list[Tried]] = {}
        for one in results:
            if isinstance(one, Tried):
                tried.setdefault(one.linear, []).append(one)
        wanda = Spread.joined(one.wanda for one in scored)
        costs = {linear: np.add.reduce([own.costs for own in parts]).tolist() for linear, parts in tried.items()}
        levels = {
            (linear, level): torch.cat([own.rows[level] for own in parts])
            for linear, parts in tried.items()
            for level in range(len(self.levels))
        }
        found = BlockScores(
            linears={
                one.linear: one.scores.model_copy(update={"costs": tuple(costs.get(one.linear, ()))}) for one in scored
            },
            outliers=1 - wanda.share_below(OUTLIER * wanda.total / wanda.count),
            levels=store.put(f"{place}.safetensors", level_file(levels)) if levels else None,
            rows=tuple(row for one in scored for row in one.rows),
        )
        return store.put(f"{place}.scores.json", found.model_dump_json().encode())
