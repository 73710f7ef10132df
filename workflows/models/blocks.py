"""A model as blocks that run alone, fed exactly as the whole model would feed them; what all kinds of models share."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workflows.models.ahead import Ahead
from workflows.models.checkpoint import Checkpoint
from workflows.models.experts import prunable
from workflows.models.whole import empty_model, fill, layers_of


@dataclass(frozen=True)
class Linear:
    """One prunable matrix [rows, columns]; `group` is the first linear that reads the same input (q, k, v: q)."""

    name: str
    rows: int
    columns: int
    group: str


class Head(Protocol):
    """What comes after the last block, with its weights, and what the model is held to there."""

    def loss(self, hidden: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
        """Loss of one window in nats, summed over its predictions, and ∂L/∂hidden.

        Args:
            hidden: [1, length, width], what the last block gives.
            wanted: what should be predicted, see `workflows.data.windows.Windows.wanted`.
        """

    def divergence(self, dense: Tensor, candidates: Sequence[Tensor]) -> Tensor:
        """KL(dense ‖ candidate) in nats, summed over the places given, [candidates] fp64.

        Args:
            dense: [places, width], what the last block gives in the dense model at the places that are judged.
            candidates: the same of each candidate.
        """


class Blocks(ABC):
    """Runs the blocks of one model alone, one after the other.

    Args:
        checkpoint: where tensors come from.
        dtype: type of weights and activations.
        length: tokens in the longest window.
        device: where blocks run.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, length: int, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.length = length
        self._model = empty_model(checkpoint.state.config, dtype)
        self._layers = layers_of(self._model, checkpoint.state.config)
        self._ahead = Ahead(checkpoint.read_block, pinned=torch.device(device).type == "cuda")

    @abstractmethod
    def embed(self, windows: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """Token numbers, [length] each, → hidden states [1, length, width] that enter block 0, on the device.

        Only the rows of the tokens at hand are read. Each has memory of its own and can be freed alone.
        """

    @abstractmethod
    def head(self) -> Head:
        """What comes after the last block, with its weights."""

    @abstractmethod
    def positions(self, stride: int) -> range:
        """Places of a window at which predictions are judged, where every `stride`-th is enough.

        Raises:
            InputError: the stride leaves none.
        """

    @abstractmethod
    def _arguments(self, index: int) -> dict[str, Any]:
        """What the model hands to a block beside the hidden states; the same for all windows."""

    def block(self, index: int) -> nn.Module:
        """Block `index` with its own tensors. Only the caller's reference keeps them in memory."""
        return self.block_of(index, self._ahead.take(index))

    def read_ahead(self, index: int) -> None:
        """Begins to read the block that will be asked for next, if there is such a block."""
        if 0 <= index < len(self._layers):
            self._ahead.begin(index)

    def block_of(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> nn.Module:
        """Block `index` with the given tensors. Only the caller's reference keeps them in memory."""
        return fill(copy.deepcopy(self._layers[index]), tensors, self.dtype, self.device)

    def linears(self, index: int) -> list[Linear]:
        """The prunable matrices of a block, in the order in which the block uses them.

        Which of them read the same input is found by running the empty block on empty tensors.
        """
        block = copy.deepcopy(self._layers[index]).to("meta")
        found: list[tuple[str, nn.Linear, Tensor]] = []
        for name, module in prunable(block).items():
            module.register_forward_pre_hook(lambda own, args, name=name: found.append((name, own, args[0])))
        hidden = torch.empty(
            1, self.length, self.checkpoint.state.config["hidden_size"], dtype=self.dtype, device="meta"
        )
        block(hidden, **{name: to_device(value, "meta") for name, value in self._arguments(index).items()})
        first_reader: dict[int, str] = {}
        return [
            Linear(name, module.out_features, module.in_features, first_reader.setdefault(id(inputs), name))
            for name, module, inputs in found
        ]

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states [windows, length, width] through a block, as the whole model would run it."""
        out = block(hidden, **self._arguments(index))
        return out[0] if isinstance(out, tuple) else out


def to_device(value: Any, device: str) -> Any:
    """Moves a tensor, or a tuple of them, to a device; leaves anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(to_device(item, device) for item in value) if isinstance(value, tuple) else value
