"""What a process frees goes back to its machine when a piece of work is done, not at every free.

A worker's memory must fall when a block is dropped, for it shares the machine with others. glibc either gives a large
piece back at once, and then every activation of every window is mapped and zeroed anew (a quarter more time for a
forward pass), or keeps it for the next one. Workers keep it, and give it back when a piece of work is done.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Pieces under 8 MiB come from the heap, which is not cut at every free: activations of small models. Those of large
# ones are mapped, but there products take so much longer than a page that it does not matter.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; elsewhere there is nothing to call


@contextmanager
def giving_back() -> Iterator[None]:
    """Gives free pages back to the machine at the end."""
    try:
        yield
    finally:
        if _trim is not None:
            _trim(0)
