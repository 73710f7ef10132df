"""How much memory a shard worker needs, told before anything runs."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.freed import KEPT
from cluster.spec import ClusterSpec
from cluster.sums import TOGETHER
from workflows.models.expert_names import place_of
from workflows.models.experts import prunable
from workflows.models.families import Family, family_of
from workflows.models.whole import empty_model, layers_of
from workflows.pruning.solvers import statistic_for
from workflows.recipe import Recipe

GIB = 1 << 30
GAPS = 128 << 20  # bytes


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes that one worker holds at its peak, above an idle Python with torch.

    Attributes:
        block: one block's weights in the type it is run in.
        activations: hidden states of the worker's shards; twice where block recovery keeps the dense model's beside
            them, or scoring what the block at hand made of them.
        halted: what windows within a block keep while linears before them are pruned: what the down projection will
            read, or queries, keys, values and what attention made of them.
        grams: statistics of the inputs that are looked at together: those of one turn, where linears see pruned states,
            else those of a block. As many times as sums over some of the worker's shards wait for each other.
        gradients: of one block's weights, for block recovery; when they are made, the statistics are gone.
        boundaries: what enters each block, kept for the way back of a gradient pass; more than that is spilled.
    """

    block: int
    activations: int
    halted: int
    grams: int
    gradients: int
    boundaries: int

    @property
    def peak(self) -> int:
        """A block, the next one on its way in, the activations, what the hungriest step holds besides.

        And as much again, up to what a process may keep free, and some at least: pieces of many sizes leave gaps.
        """
        held = max(self.grams + self.halted, self.gradients, self.boundaries)
        used = 2 * self.block + self.activations + held
        return used + min(max(used, GAPS), KEPT)


def worker_memory(config: dict[str, Any], recipe: Recipe, cluster: ClusterSpec) -> WorkerMemory:
    """Peak memory of a worker, from the config alone.

    Args:
        config: the dense model's config.json.
        recipe: gives type, calibration size, pattern and solver.
        cluster: how many workers share the calibration shards, and how much of a gradient pass each keeps.
    """
    item = torch.finfo(getattr(torch, recipe.dtype)).bits // 8
    with torch.device("meta"):
        block = layers_of(empty_model(config, torch.bfloat16), config)[0]
    calibration = recipe.data.calibration
    largest_share = math.ceil(recipe.data.shards / cluster.workers) / recipe.data.shards
    windows = math.ceil(calibration.windows * largest_share)
    parameters = sum(parameter.numel() for parameter in block.parameters())
    hidden = item * windows * calibration.length * int(config["hidden_size"])
    return WorkerMemory(
        block=item * parameters,
        activations=(2 if recipe.recovery or recipe.needs_scores else 1) * hidden,
        halted=hidden * _halted_widths(block, config) // int(config["hidden_size"])
        if recipe.propagate == "pruned" and recipe.target.pattern != "ffn"
        else 0,
        grams=4 * _statistics(block, recipe, family_of(config)) * _sums(recipe, cluster),
        gradients=4 * parameters if recipe.recovery else 0,
        boundaries=min(int(cluster.spill_above_gib * GIB), hidden * int(config["num_hidden_layers"]))
        if recipe.needs_gradients
        else 0,
    )


def _halted_widths(block: nn.Module, config: dict[str, Any]) -> int:
    """Numbers that a window keeps per token within a block, at most."""
    hidden = int(config["hidden_size"])
    inputs = {name: one.in_features for name, one in prunable(block).items()}
    chosen = int(config.get("num_experts_per_tok") or 1)
    widest = max(width * (chosen if ".experts." in name else 1) for name, width in inputs.items())
    return max(hidden + widest, 4 * hidden)


def _statistics(block: nn.Module, recipe: Recipe, family: Family) -> int:
    """Numbers in the statistics of inputs that are looked at together."""
    linears = prunable(block)
    if recipe.target.pattern == "ffn":
        return linears[family.ffn_output].in_features ** 2
    by_turn: dict[str, int] = {}
    for name, one in linears.items():
        if not name.endswith(family.followers):  # q, k and v share an input, and gate and up another one
            by_turn[place_of(name)] = by_turn.get(place_of(name), 0) + _statistic_size(one.in_features, recipe)
    turn_by_turn = recipe.propagate == "pruned" and not recipe.needs_scores
    return max(by_turn.values()) if turn_by_turn else sum(by_turn.values())


def _statistic_size(width: int, recipe: Recipe) -> int:
    """Numbers in one input's statistics."""
    statistic = statistic_for(recipe.solver.name, recipe.solver.goes_on)
    return {"none": 0, "diagonal": width, "gram": width * width}[statistic]


def _sums(recipe: Recipe, cluster: ClusterSpec) -> int:
    """Sums over shards that a worker holds at once."""
    return min(math.ceil(recipe.data.shards / cluster.workers), TOGETHER)
