"""Reads a model's next block while the one at hand is at work, so that storage and processor need not take turns."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

Named = tuple[str, Tensor]


class Ahead:
    """Hands out the tensors of blocks, one of which may be on its way already.

    Beside what it handed out it holds one block at most, in the type in which it is stored; so who works by turns
    begins to read once the turn that takes most memory is over.

    Args:
        read: the tensors of a block, one after the other.
        pinned: whether what is read ahead is put into page-locked memory, from which a GPU fetches it by itself while
            the processor goes on.
    """

    def __init__(self, read: Callable[[int], Iterator[Named]], pinned: bool) -> None:
        self._read = read
        self._pinned = pinned
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._coming: tuple[int, Future[list[Named]]] | None = None

    def begin(self, block: int) -> None:
        """Begins to read the block that will be taken next, instead of whatever was on its way."""
        self._coming = block, self._reader.submit(self._whole, block)

    def take(self, block: int) -> Iterator[Named]:
        """The tensors of a block; each is let go of when the next one is asked for.

        Raises:
            What reading the block raised, now or ahead.
        """
        coming, self._coming = self._coming, None
        return _drained(coming[1].result()) if coming and coming[0] == block else self._read(block)

    def _whole(self, block: int) -> list[Named]:
        return [(name, one.pin_memory() if self._pinned else one) for name, one in self._read(block)]


def _drained(tensors: list[Named]) -> Iterator[Named]:
    while tensors:
        yield tensors.pop()
