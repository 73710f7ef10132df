"""Activations at the borders between blocks, kept for a backward pass: in memory, beyond a limit on local disk."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedRandom

import torch
from torch import Tensor

from cluster.disk import room_needed


@dataclass(frozen=True)
class OnDisk:
    """Where a shard's windows lie in a block's file, one after the other."""

    start: int
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype


class Boundaries:
    """Hidden states that enter each block, of some shards.

    What is spilled lies in one file per block without a name, so nothing is left of it when the process ends,
    however it ends.

    Args:
        limit: bytes that stay in memory; what comes after them is spilled to the directory for temporary files
            (`TMPDIR`).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._places: dict[tuple[int, int], Sequence[Tensor] | OnDisk] = {}
        self._files: dict[int, BufferedRandom] = {}

    def keep(self, block: int, shard: int, windows: Sequence[Tensor]) -> None:
        """Keeps what enters a block, one tensor per window, all of one type. They are not to be changed afterwards.

        What is on a GPU is kept in the machine's memory.

        Raises:
            Unavailable: the disk is full.
        """
        size = sum(window.nbytes for window in windows)
        if self._held + size <= self._limit or not windows:
            self._held += size
            self._places[block, shard] = [window.cpu() for window in windows]
            return
        with room_needed("activations spilled to the directory for temporary files (TMPDIR)"):
            if block not in self._files:
                self._files[block] = tempfile.TemporaryFile(prefix="karikomi-")  # noqa: SIM115 – closed by `drop`
            file = self._files[block]
            place = OnDisk(file.seek(0, os.SEEK_END), tuple(one.shape for one in windows), windows[0].dtype)
            for window in windows:
                file.write(window.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
        self._places[block, shard] = place

    def windows(self, block: int, shard: int) -> Iterator[Tensor]:
        """What was kept, window by window; from disk into memory of their own, and only as they are asked for."""
        place = self._places[block, shard]
        if not isinstance(place, OnDisk):
            yield from place
            return
        file = self._files[block]
        file.seek(place.start)
        for shape in place.shapes:
            window = torch.empty(shape, dtype=place.dtype)
            read = file.readinto(window.flatten().view(torch.uint8).numpy().data)
            assert read == window.nbytes, f"{read} of {window.nbytes} bytes"
            yield window

    def drop(self, block: int) -> None:
        """Frees what entered a block."""
        for key in [key for key in self._places if key[0] == block]:
            place = self._places.pop(key)
            if not isinstance(place, OnDisk):
                self._held -= sum(window.nbytes for window in place)
        if block in self._files:
            self._files.pop(block).close()

    @property
    def spilled(self) -> int:
        """Bytes on disk just now."""
        return sum(
            shape.numel() * place.dtype.itemsize
            for place in self._places.values()
            if isinstance(place, OnDisk)
            for shape in place.shapes
        )
