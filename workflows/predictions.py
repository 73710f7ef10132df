"""What a model itself predicts at some places of its calibration windows: what candidates are held against.

Kept is what the last block gives there. The head is the same for all, and a vocabulary far wider than a model.
One pass for all that is judged later.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from cluster.remote import call_each, share_out
from cluster.spec import ClusterSpec
from cluster.storage import Store, Stored, open_store
from workflows.calibrated import Calibrated
from workflows.observing import move_on

NAME = "states"


@dataclass
class Predicting(Calibrated):
    """Looks at a model's predictions, see `Calibrated`.

    Attributes:
        stride: every how-many-th position of a window is judged: stride − 1, 2 · stride − 1 and so on. With a large
            vocabulary the head costs more than the blocks.
    """

    stride: int

    @property
    def positions(self) -> range:
        """Which places of each window are judged.

        Raises:
            InputError: the stride leaves none.
        """
        return self._decoder.positions(self.stride)

    @torch.no_grad()
    def keep(self, windows: Sequence[int], key_prefix: str) -> list[Stored]:
        """Passes some windows through the model, and puts the states [places, width] of each into its store."""
        positions, states = list(self.positions), self._entering(windows)
        for block in range(self.block_count):
            module = self._decoder.block(block)
            self._decoder.read_ahead(block + 1)
            move_on(self._decoder, block, module, states)
        store = open_store(self.before.store)
        return [
            store.put(f"{key_prefix}/{window:05d}.safetensors", save({NAME: hidden[0, positions].cpu()}))
            for window, hidden in zip(windows, states, strict=True)
        ]


def read_predictions(store: Store, key: str) -> Tensor:
    """What `Predicting.keep` put for a window."""
    return load(store.get(key))[NAME]


def keep_predictions(
    work: Predicting,
    windows: Sequence[int],
    key_prefix: str,
    cluster: ClusterSpec,
    stop: Callable[[], bool],
    on_done: Callable[[int, int], None],
) -> dict[int, Stored]:
    """What the model predicts for some calibration windows, by their numbers; on a Ray cluster.

    Raises:
        InputError: the stride leaves no token of a window.
        Cancelled: `stop` said so.
        Unavailable: no machines, or workers were lost again and again.
    """
    parts = call_each(
        _keep,
        [(work, own, key_prefix) for own in share_out(windows, cluster.workers)],
        cpus=work.threads,
        gpus=cluster.gpus_per_worker,
        stop=stop,
        on_done=on_done,
        stuck_after=cluster.block_seconds,
    )
    return dict(zip(windows, itertools.chain.from_iterable(parts), strict=True))


def _keep(work: Predicting, windows: Sequence[int], key_prefix: str) -> list[Stored]:
    work.setup()
    return work.keep(windows, key_prefix)
