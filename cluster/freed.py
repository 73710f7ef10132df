"""What a process frees goes back to its machine when a piece of work is done and it is much, not at every free.

A worker's memory must fall when a block is dropped, for it shares the machine with others. glibc either gives a large
piece back at once, and then every activation of every window is mapped and zeroed anew (a quarter more time for a
forward pass), or keeps it for the next one. Workers keep it, and give it back when a piece of work is done and `KEPT`
does not hold it all: memory given back between two turns of a small model's block costs a tenth of its time.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Pieces under 8 MiB come from the heap, which is not cut at every free: activations of small models. Those of large
# ones are mapped, but there products take so much longer than a page that it does not matter.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
KEPT = 1 << 30  # bytes that a process may hold free between pieces of work


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`; `fordblks` is what is free in the heap."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


_glibc = ctypes.CDLL(None)
with suppress(AttributeError):  # another C library: nothing to ask
    _glibc.mallinfo2.restype = _Heap


@contextmanager
def giving_back() -> Iterator[None]:
    """Gives free pages back to the machine at the end."""
    try:
        yield
    finally:
        with suppress(AttributeError):
            if _glibc.mallinfo2().fordblks > KEPT:
                _glibc.malloc_trim(0)
