"""What a gradient pass found, as one small safetensors object in the store; who works on a block reads only its part.

A tensor's name is that of its linear, for Γ: "model.layers.3.mlp.down_proj"; or "tokens.3" for the norms of the
gradients at the end of block 3.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import safetensors.torch
from torch import Tensor

from cluster.errors import InputError
from cluster.storage import Store, Stored, open_store
from workflows.models.checkpoint import as_tensor, header

GAMMAS = "model.layers."  # before a block's number, in the file of every family
TOKENS = "tokens."


@dataclass(frozen=True)
class Importance:
    """The result of a gradient pass; see `workflows.importance`.

    Attributes:
        loss: summed over the calibration windows, in nats.
        tokens: calibration tokens, over which Γ is a mean; of each window one is not predicted.
        gammas: one dict per block, linear → Γ [out] fp32.
        norms: ‖∂L/∂h_t‖ of each token at the end of each block, [tokens] fp32; empty when not asked for.
    """

    loss: float
    tokens: int
    gammas: Sequence[Mapping[str, Tensor]]
    norms: Sequence[Tensor] = ()


def put_gradients(store: Store, key: str, found: Importance) -> Stored:
    """Writes every Γ [out], and norms where there are some; the same numbers always give the same bytes."""
    tensors = {
        f"{GAMMAS}{block}.{name}": gamma
        for block, gammas in enumerate(found.gammas)
        for name, gamma in sorted(gammas.items())
    }
    tensors |= {f"{TOKENS}{block}": norms for block, norms in enumerate(found.norms)}
    # One entry only: safetensors writes several in an order that differs from process to process.
    about = json.dumps({"tokens": found.tokens, "loss": found.loss})
    return store.put(key, safetensors.torch.save(tensors, metadata={"about": about}))


@lru_cache(maxsize=4)  # one process solves many units of a block, and a few blocks are at work at once
def read_gammas(store: str, key: str, block: int) -> Mapping[str, Tensor]:
    """Γ of one block's linears, by name; only their bytes are read, and once in a process. Not to be changed.

    Args:
        store: address of the run's store.
        key: under which `put_gradients` wrote.
        block: its number.
    """
    return _read(store, key, f"{GAMMAS}{block}.")


@lru_cache(maxsize=1)
def read_norms(store: str, key: str, block: int) -> Tensor:
    """Norms of the gradients at the end of a block, [tokens] fp32; read once in a process. Not to be changed.

    Raises:
        InputError: the file holds none.
    """
    found = [norms for name, norms in _read(store, key, f"{TOKENS}{block}").items() if not name]
    if not found:
        raise InputError(f"{store}: {key} does not hold the norms of the tokens' gradients in block {block}")
    return found[0]


def _read(store: str, key: str, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    opened = open_store(store)
    return {
        name.removeprefix(prefix): as_tensor(opened.read(key, info.start, info.end - info.start), info, info.shape)
        for name, info in header(opened, key).items()
        if name.startswith(prefix)
    }
