"""A block's linears at several levels of sparsity, one safetensors object per block; one matrix is read at a time.

A tensor's name is its level, then its linear: "3/mlp.down_proj". Who tries out mixtures of levels reads only what they
are made of, and the header once per block.
"""

from collections.abc import Mapping
from functools import cached_property

import safetensors.torch
from torch import Tensor

from cluster.errors import InputError
from cluster.storage import Store
from workflows.models.checkpoint import as_tensor, header
from workflows.models.safetensors_header import TensorInfo


def level_file(tensors: Mapping[tuple[str, int], Tensor]) -> bytes:
    """The safetensors bytes of one block's levels; the same tensors give the same bytes, in whatever order they come.

    Args:
        tensors: (linear, level) → its weight [out, in]; "mlp.down_proj", names relative to the block.
    """
    named = {_name(linear, level): one.contiguous() for (linear, level), one in sorted(tensors.items())}
    return safetensors.torch.save(named, metadata={"format": "pt"})


class LevelFile:
    """The levels of one block in a store. Makes no request before it is asked for a tensor.

    Args:
        store: where it lies.
        key: under which `level_file`'s bytes were put.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key

    def read(self, linear: str, level: int) -> Tensor:
        """A linear's weight [out, in] at a level, in the stored type; only its bytes are read.

        Raises:
            InputError: the file is missing or broken, or does not hold this linear at this level.
        """
        name = _name(linear, level)
        if name not in self._places:
            raise InputError(f"{self._store.uri}: {self._key} does not hold {linear} at level {level}")
        info = self._places[name]
        return as_tensor(self._store.read(self._key, info.start, info.end - info.start), info, info.shape)

    @cached_property
    def _places(self) -> dict[str, TensorInfo]:
        return header(self._store, self._key)


def _name(linear: str, level: int) -> str:
    return f"{level}/{linear}"
