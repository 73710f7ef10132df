"""Levels of a block's linears, each read alone."""

import pytest
import torch

from cluster.errors import InputError
from cluster.storage import open_store
from workflows.level_files import LevelFile, level_file


def some_levels() -> dict[tuple[str, int], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        (linear, level): torch.randn(*shape, generator=random).to(dtype)
        for linear, shape in (("self_attn.q_proj", (8, 4)), ("mlp.down_proj", (4, 12)))
        for level in (0, 1, 10)
        for dtype in [torch.bfloat16 if level else torch.float32]
    }


def test_every_level_comes_back_as_it_was(store):
    levels = some_levels()
    file = LevelFile(store, store.put("levels/00000.safetensors", level_file(levels)).key)
    for (linear, level), tensor in levels.items():
        read = file.read(linear, level)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_a_matrix_costs_its_own_bytes_and_the_header_is_read_once(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    stored = store.put("levels", level_file(some_levels()))
    read, lengths = store.read, []

    def counted(key, start, length):
        lengths.append(length)
        return read(key, start, length)

    monkeypatch.setattr(store, "read", counted)
    file = LevelFile(store, stored.key)
    assert lengths == []
    file.read("mlp.down_proj", 1)
    file.read("self_attn.q_proj", 0)
    assert lengths[-2:] == [4 * 12 * 2, 8 * 4 * 4]
    assert len(lengths) == 4  # length of the header, the header, and two matrices


def test_the_same_levels_give_the_same_bytes():
    levels = some_levels()
    transposed = {name: tensor.mT.contiguous().mT for name, tensor in levels.items()}  # other strides
    assert level_file(levels) == level_file(dict(reversed(transposed.items())))


def test_a_level_that_is_not_there_is_named(tmp_path):
    store = open_store(str(tmp_path))
    file = LevelFile(store, store.put("levels", level_file(some_levels())).key)
    with pytest.raises(InputError, match=r"mlp\.down_proj at level 2"):
        file.read("mlp.down_proj", 2)
    with pytest.raises(InputError, match="missing"):
        LevelFile(store, "elsewhere").read("mlp.down_proj", 1)
