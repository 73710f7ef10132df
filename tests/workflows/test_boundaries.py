"""What is kept between blocks comes back as it was, from memory or disk, and leaves nothing behind."""

import tempfile

import pytest
import torch
from small_disk import SmallDisk, can_mount

from cluster.errors import Unavailable
from workflows.boundaries import Boundaries

SHAPE = (1, 8, 16)
SIZE = 8 * 16 * 4  # of one window in fp32


def windows_of(seed: int, count: int = 3, dtype=torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=random).to(dtype) for _ in range(count)]


def assert_kept(boundaries: Boundaries, block: int, shard: int, wanted: list[torch.Tensor]) -> None:
    found = list(boundaries.windows(block, shard))
    assert [one.dtype for one in found] == [one.dtype for one in wanted]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_stay_in_memory_and_the_others_come_from_disk(temporary, dtype):
    size = SIZE * dtype.itemsize // 4
    boundaries = Boundaries(limit=7 * size)
    kept = {(block, shard): windows_of(10 * block + shard, dtype=dtype) for block in range(3) for shard in range(2)}
    for (block, shard), windows in kept.items():
        boundaries.keep(block, shard, windows)
    assert boundaries.spilled == 4 * 3 * size
    for (block, shard), windows in reversed(kept.items()):
        assert_kept(boundaries, block, shard, windows)
    boundaries.drop(0)
    boundaries.keep(3, 0, kept[0, 0])
    assert boundaries.spilled == 4 * 3 * size, "room that was freed in memory is not used"
    for block in (1, 2, 3):
        boundaries.drop(block)
    assert boundaries.spilled == 0


def test_windows_that_lie_apart_in_memory_and_shards_without_any(temporary):
    boundaries = Boundaries(limit=0)
    apart = list(torch.randn(8, 3, 16).transpose(0, 1).unsqueeze(1))
    boundaries.keep(0, 0, apart)
    boundaries.keep(0, 1, [])
    assert_kept(boundaries, 0, 0, apart)
    assert_kept(boundaries, 0, 1, [])


def test_what_is_spilled_has_no_name_so_that_a_killed_process_leaves_nothing(temporary):
    boundaries = Boundaries(limit=0)
    boundaries.keep(0, 0, windows_of(0))
    assert boundaries.spilled == 3 * SIZE
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small file system")
def test_a_full_disk_is_told(tmp_path, monkeypatch):
    with SmallDisk(tmp_path / "disk", 1 << 20) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
        disk.leave(SIZE)
        boundaries = Boundaries(limit=0)
        with pytest.raises(Unavailable, match=r"activations spilled .* cannot be written: No space left on device"):
            boundaries.keep(0, 0, windows_of(0, count=60))
        del boundaries
