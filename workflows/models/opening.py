"""Which adapter runs a model's blocks: the one place that knows."""

import torch

from workflows.models.blocks import Blocks
from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder
from workflows.models.encoder import Encoder
from workflows.models.families import family_of
from workflows.models.state import ModelState


def open_blocks(state: ModelState, dtype: torch.dtype, length: int, device: str) -> Blocks:
    """A model as blocks that run alone.

    Args:
        state: which model.
        dtype: type of weights and activations.
        length: tokens in the longest window.
        device: where blocks run.
    """
    kind = Encoder if family_of(state.config).classifies else Decoder
    return kind(Checkpoint(state), dtype, length, device)
