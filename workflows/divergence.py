"""Judges candidates, each a choice of a level for every linear, by how far their predictions are from the model's own.

The model is streamed block by block, with all candidates at once: a block, and the levels that candidates take of it,
are read once. Candidates share their hidden states for as long as they are equal; so of two that differ in the last
block alone, the second costs no more than that block. What the model itself predicts was kept before.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from cluster.remote import call_each, share_out
from cluster.spec import ClusterSpec
from cluster.storage import Stored, open_store
from workflows.level_files import LevelFile
from workflows.predictions import Predicting, read_predictions

# Per block: linear → level. A linear that is missing stays as it is in the model.
Candidate = tuple[Mapping[str, int], ...]


@dataclass
class Track:
    """Hidden states that some candidates share, for they were equal so far.

    Attributes:
        followers: numbers of the candidates.
        states: one [1, length, width] per window.
    """

    followers: list[int]
    states: list[Tensor]


@dataclass
class Divergence(Predicting):
    """Judges candidates for a model; see `Predicting`, of which `before` is the model and the measure.

    In memory are a block, those levels of its linears that candidates take, and hidden states [windows, length, width]
    per track; there are at most as many tracks as candidates.

    Attributes:
        levels: a level file per block, in the model's store.
        predicted: what the model itself predicts, by window; at least of those that are judged.
    """

    levels: tuple[Stored, ...]
    predicted: Mapping[int, Stored]

    @torch.no_grad()
    def of(self, windows: Sequence[int], candidates: Sequence[Candidate]) -> np.ndarray:
        """Divergence [windows, candidates] fp64, in nats: the sum over a window's judged tokens.

        A number does not depend on which windows and candidates are asked for together.

        Args:
            windows: numbers of calibration windows.
            candidates: each with one entry per block.

        Raises:
            InputError: a level file does not hold what a candidate takes.
        """
        assert all(len(one) == len(self.levels) == self.block_count for one in candidates)
        positions = list(self.positions)
        tracks = [Track(list(range(len(candidates))), self._entering(windows))]
        for block in range(self.block_count):
            tracks = self._through(block, tracks, [one[block] for one in candidates])
        sums = np.zeros((len(windows), len(candidates)))
        head, store = self._decoder.head(), open_store(self.before.store)
        for place, (window, own) in enumerate(zip(windows, sums, strict=True)):
            dense = read_predictions(store, self.predicted[window].key).to(self.device)
            states = [one.states[place][0, positions] for one in tracks]
            for track, found in zip(tracks, head.divergence(dense, states).tolist(), strict=True):
                own[track.followers] = found
        return sums

    def _through(self, block: int, tracks: list[Track], plans: Sequence[Mapping[str, int]]) -> list[Track]:
        """Moves all tracks through a block and parts those whose candidates differ in it."""
        own = self._decoder.block(block).state_dict()
        self._decoder.read_ahead(block + 1)
        levels = LevelFile(open_store(self.before.store), self.levels[block].key)

        @cache
        def weight(linear: str, level: int) -> Tensor:
            return levels.read(linear, level).to(device=self.device, dtype=self._decoder.dtype)

        @cache
        def module(plan: frozenset[tuple[str, int]]) -> nn.Module:
            """The block as planned; all that are made share their weights."""
            taken = {f"{linear}.weight": weight(linear, level) for linear, level in plan}
            return self._decoder.block_of(block, (own | taken).items())

        moved = []
        while tracks:
            track = tracks.pop(0)  # so that its states can go
            parts: dict[frozenset[tuple[str, int]], list[int]] = {}
            for follower in track.followers:
                parts.setdefault(frozenset(plans[follower].items()), []).append(follower)
            for plan, followers in parts.items():
                states = [self._decoder.run(block, module(plan), hidden) for hidden in track.states]
                moved.append(Track(followers, states))
        return moved


def divergences(
    work: Divergence,
    candidates: Sequence[Candidate],
    cluster: ClusterSpec,
    windows: Sequence[int],
    stop: Callable[[], bool],
    on_done: Callable[[int, int], None],
) -> np.ndarray:
    """Mean divergence [candidates] fp64, in nats per judged token, on a Ray cluster.

    Each task takes some windows and all candidates, for these share blocks, levels and states; where workers are more
    than windows, some candidates. How many tasks there are changes no bit.

    Args:
        work: the model and its levels.
        candidates: at least one, each with one entry per block.
        cluster: how many workers.
        windows: numbers of the calibration windows that are looked at.
        stop: asked while waiting.
        on_done: told how many of how many tasks are done.

    Raises:
        InputError: the stride leaves no token of a window.
        Cancelled: `stop` said so.
        Unavailable: no machines, or workers were lost again and again.
    """
    assert work.predicted.keys() >= set(windows)
    tokens = len(windows) * len(work.positions)
    rows = share_out(windows, cluster.workers)
    columns = share_out(candidates, cluster.workers // len(rows))
    parts = call_each(
        judge,
        [(work, row, column) for row in rows for column in columns],
        cpus=work.threads,
        gpus=cluster.gpus_per_worker,
        stop=stop,
        on_done=on_done,
        stuck_after=cluster.block_seconds,
    )
    whole = np.block([parts[start : start + len(columns)] for start in range(0, len(parts), len(columns))])
    # not numpy's sum, whose order depends on how many candidates lie side by side
    return np.array([math.fsum(one) / tokens for one in whole.T])


def judge(work: Divergence, windows: Sequence[int], candidates: Sequence[Candidate]) -> np.ndarray:
    """See `Divergence.of`; runs in a task."""
    work.setup()
    return work.of(windows, candidates)
