"""From a model to the share that each of its linears gives, and to what its tokens are weighed by: steps of a run.

    gradients   Γ of every linear, one backward pass                       composite, measured, evolve; token weights
    score       inputs of every linear; what it is worth, what it costs    all but uniform
    predict     what the model itself predicts                             measured, evolve
    weigh       each block pruned alone, judged by the model's predictions measured, evolve
    mix         mixes from uniform to the cheapest, judged as well         measured, evolve
    evolve      mixes like the best of them, again and again               evolve
    allocate    the shares; pure

What decides is judged on many windows, for a search learns a few by heart; what only sorts out, on a few.
Everything is recorded in the run's journal, so a run that was cut off goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from cluster.spec import ClusterSpec
from cluster.storage import MissingKey, Store, Stored
from workflows.allocation.evolution import offspring, survivor
from workflows.calibrated import as_asked
from workflows.data.windows import from_parquet
from workflows.divergence import Candidate, Divergence, divergences
from workflows.gradient_files import put_gradients
from workflows.importance import measure_importance
from workflows.models.state import ModelState
from workflows.predictions import Predicting, keep_predictions
from workflows.recipe import Recipe, Solver
from workflows.score_table import table, write_table
from workflows.scored import BlockScores, ScoreStage
from workflows.stages import all_blocks
from workflows.steps import Journal, Work
from workflows.units import MIDDLE, Units, levels_for

JUDGED_EVERY = 8  # tokens; with a large vocabulary the head costs more than the blocks
CONFIRMING = 8  # times as many windows judge the few mixes among which the choice is; EvoPress's rounds grow as fast
FINALISTS = 2  # of a generation's children are judged on those

Shares = tuple[dict[str, float], ...]


class Gradients(BaseModel):
    """Γ of every linear, `tokens` that it is a mean over, and the loss summed over them in nats.

    Where tokens are weighed, the norms of their gradients are in the same file.
    """

    model_config = ConfigDict(frozen=True)

    stored: Stored
    tokens: int
    loss: float


class Scores(BaseModel):
    """An object of `BlockScores` per block, and the saliency table where there were gradients."""

    model_config = ConfigDict(frozen=True)

    blocks: tuple[Stored, ...]
    table: Stored | None


class Predictions(BaseModel):
    """An object of `Predicting.keep` per window, by the window's number."""

    model_config = ConfigDict(frozen=True)

    windows: dict[int, Stored]


class Weights(BaseModel):
    """Divergence in nats per token of the model with one block alone at the middle level, block by block."""

    model_config = ConfigDict(frozen=True)

    alone: tuple[float, ...]


class Mix(BaseModel):
    """A level for every unit (linears in order, block by block), and its divergence in nats per token."""

    model_config = ConfigDict(frozen=True)

    levels: tuple[int, ...]
    divergence: float


class Allotted(BaseModel):
    """The share of each linear that goes, by name, one dict per block."""

    model_config = ConfigDict(frozen=True)

    shares: Shares


class Judge(Protocol):
    """What tells mixes of one model apart."""

    def __call__(
        self,
        candidates: Sequence[Candidate],
        windows: Sequence[int],
        on_done: Callable[[int, int], None] = ...,
    ) -> np.ndarray:
        """Divergences [candidates] on some calibration windows, in nats per token."""
        ...


@dataclass
class Allocating:
    """Carries the steps out for one stage of a run; see `compress.Run`.

    Attributes:
        number: of the stage.
        before: the model that it begins with.
        windows: token windows of all roles.
        sparsity: what linears give together.
        how: everything besides that changes bits: digests of model and windows, device, threads.
    """

    recipe: Recipe
    cluster: ClusterSpec
    journal: Journal
    connect: Callable[[], None]
    stop: Callable[[], bool]
    number: int
    before: ModelState
    windows: Stored
    sparsity: float
    how: dict[str, Any]

    def shares(self) -> Shares:
        """What every linear gives; empty when all give `sparsity`."""
        asked = self.recipe.allocation
        if not self.recipe.needs_scores:
            return ()
        scores = self._score()
        if asked.policy == "uniform":
            return ()
        mix, known = None, self.how | {"scores": scores.blocks, "sparsity": self.sparsity}
        if asked.tries_levels:
            predicted, judged = self._predict(), known | {"judged": self._few}
            weights = self._weigh(scores, predicted, judged)
            mix = self._mix(scores, predicted, weights, judged | {"confirmed": self._many})
            if asked.policy == "evolve":
                mix = self._evolve(scores, predicted, mix, known | {"allocation": asked})

        def allocate(work: Work) -> Allotted:
            units = Units(_scores(work.store, scores), asked, self.sparsity)
            return Allotted(shares=tuple(units.shares(mix.levels if mix else ())))

        inputs = known | {"allocation": asked, "mix": mix}
        return self.journal.step("allocate", inputs, Allotted, allocate, self.number).shares

    def norms(self) -> Stored | None:
        """What tokens are weighed by, see `workflows.observing`; None where all count the same."""
        return self._gradients.stored if self.recipe.weighs_tokens else None

    @cached_property
    def _gradients(self) -> Gradients:
        """Γ of every linear; norms of the tokens' gradients too, where they are asked for."""

        def measure(work: Work) -> Gradients:
            self.connect()
            found = measure_importance(
                self.before, self.windows, self.recipe, self.cluster, work.advanced, self.stop
            )  # fmt: skip
            stored = put_gradients(work.store, f"{work.prefix('scores')}.gammas.safetensors", found)
            return Gradients(stored=stored, tokens=found.tokens, loss=found.loss)

        inputs = self.how | ({"norms": True} if self.recipe.weighs_tokens else {})
        return self.journal.step("gradients", inputs, Gradients, measure, self.number)

    def _score(self) -> Scores:
        """What every linear is worth; at every level, where there are some, what it costs."""
        asked, norms = self.recipe.allocation, self.norms()
        gradients = self._gradients if self.recipe.needs_saliency else None
        levels, solver = levels_for(asked, self.sparsity), _trial_solver(self.recipe.solver)
        inputs = self.how | {"gradients": gradients, "levels": levels, "solver": solver}

        def score(work: Work) -> Scores:
            self.connect()
            stage = ScoreStage(
                **as_asked(self.recipe, self.before, self.windows),
                norms=norms,
                gammas=gradients.stored if gradients else None,
                levels=levels,
                solver=solver,
                key_prefix=work.prefix("scores"),
            )

            found = Scores(blocks=all_blocks(work, stage, self.cluster, self.stop), table=None)
            if gradients is None:
                return found
            rows = [row for block in _scores(work.store, found) for row in block.rows]
            calibration = self.recipe.data.calibration
            texts = calibration.windows  # a classifier predicts once for each, a language model all tokens but one
            predicted = texts if self.recipe.classifies else gradients.tokens - gradients.tokens // calibration.length
            lines = table(rows, gradients.tokens, predicted, gradients.loss)
            return found.model_copy(update={"table": write_table(work.store, self.journal.root, self.number, lines)})

        return self.journal.step("score", inputs | weighed_by(norms), Scores, score, self.number)

    def _predict(self) -> Predictions:
        """What the model itself predicts for all windows that mixes are judged on."""
        every = self.recipe.allocation.policy == "evolve"  # each generation draws some of its own
        windows = list(range(self.recipe.data.calibration.windows)) if every else sorted(self._many)

        def predict(work: Work) -> Predictions:
            self.connect()
            asked = Predicting(**as_asked(self.recipe, self.before, self.windows), stride=JUDGED_EVERY)
            prefix = f"{work.prefix('scores')}/predicted"
            found = keep_predictions(asked, windows, prefix, self.cluster, self.stop, work.advanced)
            return Predictions(windows=found)

        return self.journal.step("predict", self.how | {"judged": windows}, Predictions, predict, self.number)

    def _weigh(self, scores: Scores, predicted: Predictions, inputs: dict[str, Any]) -> Weights:
        """What pruning each block alone does to the model's predictions."""

        def weigh(work: Work) -> Weights:
            self.connect()
            units, judge = self._judge(work, scores, predicted)
            candidates = [
                tuple(
                    {name: MIDDLE for name in block.linears} if own == alone else {}
                    for own, block in enumerate(units.blocks)
                )
                for alone in range(len(units.blocks))
            ]
            return Weights(alone=tuple(judge(candidates, self._few, work.advanced).tolist()))

        return self.journal.step("weigh", inputs, Weights, weigh, self.number)

    def _mix(self, scores: Scores, predicted: Predictions, weights: Weights, inputs: dict[str, Any]) -> Mix:
        """The best of the mixes from the same level for all to the one of the lowest expected cost."""

        def mix(work: Work) -> Mix:
            self.connect()
            units, judge = self._judge(work, scores, predicted)
            mixes = np.array(units.mixes(weights.alone))
            return _best(mixes, judge(_candidates(units, mixes), self._many, work.advanced))

        return self.journal.step("mix", inputs | {"weights": weights}, Mix, mix, self.number)

    def _evolve(self, scores: Scores, predicted: Predictions, start: Mix, inputs: dict[str, Any]) -> Mix:
        """The best mix of levels that a small evolutionary search finds.

        Each generation tries its children on a few windows of its own, and the best of them on as many as the parent.
        """
        asked, count = self.recipe.allocation, self.recipe.data.calibration.windows

        def evolve(work: Work) -> Mix:
            self.connect()
            units, judge = self._judge(work, scores, predicted)

            def generation(round_: int, parent: Mix) -> Mix:
                chance = np.random.default_rng([self.recipe.seed, self.number, round_])
                own = np.array(parent.levels)
                children = offspring(own, units.levels, units.sizes, self.sparsity, asked.children, chance)
                few = sorted(chance.choice(count, asked.windows, replace=False).tolist())
                finalists = children[judge(_candidates(units, children), few).argsort()[:FINALISTS]]
                judged = judge(_candidates(units, finalists), self._many)
                return _best(np.concatenate([own[None], finalists]), np.concatenate([[parent.divergence], judged]))

            mix = start
            for round_ in range(1, asked.generations + 1):
                mix = _kept(work, round_, lambda round_=round_, mix=mix: generation(round_, mix))  # type: ignore[misc]
                work.advanced(round_, asked.generations, divergence=mix.divergence)
            return mix

        return self.journal.step("evolve", inputs | {"start": start}, Mix, evolve, self.number)

    @property
    def _few(self) -> list[int]:
        """Numbers of the calibration windows that sort out."""
        return self._in_turn[: self.recipe.allocation.windows]

    @property
    def _many(self) -> list[int]:
        """Numbers of the calibration windows that decide."""
        return self._in_turn[: confirming(self.recipe)]

    @cached_property
    def _in_turn(self) -> list[int]:
        return from_parquet(self.journal.store.get(self.windows.key))["calibration"].in_turn()

    def _judge(self, work: Work, scores: Scores, predicted: Predictions) -> tuple[Units, Judge]:
        """The units, and what judges mixes of their levels."""
        blocks = _scores(work.store, scores)
        levels = tuple(one.levels for one in blocks if one.levels is not None)
        assert len(levels) == len(blocks)
        judge = Divergence(
            **as_asked(self.recipe, self.before, self.windows),
            levels=levels,
            stride=JUDGED_EVERY,
            predicted=predicted.windows,
        )

        def judged(
            candidates: Sequence[Candidate],
            windows: Sequence[int],
            on_done: Callable[[int, int], None] = lambda done, total: None,
        ) -> np.ndarray:
            return divergences(judge, candidates, self.cluster, windows, self.stop, on_done)

        return Units(blocks, self.recipe.allocation, self.sparsity), judged


def confirming(recipe: Recipe) -> int:
    """How many calibration windows judge mixes among which the choice is."""
    return min(CONFIRMING * recipe.allocation.windows, recipe.data.calibration.windows)


def weighed_by(norms: Stored | None) -> dict[str, Any]:
    """What the weights of tokens add to a step's inputs: nothing where all count the same."""
    return {"norms": norms.sha256} if norms else {}


def _trial_solver(solver: Solver) -> Solver:
    """What prunes linears on trial: the recipe's solver, but not several times slower than another that ranks alike."""
    name = "sparsegpt" if solver.name == "admm" else solver.name
    return Solver(name=name, damping=solver.damping, rows=solver.rows)


def _scores(store: Store, scores: Scores) -> list[BlockScores]:
    return [BlockScores.model_validate_json(store.get(one.key)) for one in scores.blocks]


def _candidates(units: Units, mixes: np.ndarray) -> list[Candidate]:
    return [tuple(units.by_block(mix)) for mix in mixes.tolist()]


def _best(mixes: np.ndarray, divergences: np.ndarray) -> Mix:
    return Mix(levels=tuple(survivor(divergences, mixes).tolist()), divergence=float(np.nanmin(divergences)))


def _kept(work: Work, number: int, make: Callable[[], Mix]) -> Mix:
    """A generation of an earlier attempt at this step, else a new one, which is kept."""
    key = f"{work.prefix('scores')}/{number:05d}.mix.json"
    try:
        return Mix.model_validate(work.store.get_json(key))
    except MissingKey:
        made = make()
        work.store.put_json(key, made.model_dump())
        return made
