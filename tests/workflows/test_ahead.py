"""The next block is read while the one at hand is at work: once, and whatever was guessed, the right one is handed out."""

import threading
import weakref
from collections import Counter

import pytest
import torch
from models_for_tests import write_tiny_model
from test_decoder import state_of

from cluster.errors import InputError
from workflows.models.ahead import Ahead
from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder

PATIENCE = 60  # seconds


class Reads:
    """Blocks of two tensors that hold their number; who read how often, and a gate before each."""

    def __init__(self) -> None:
        self.count: Counter[int] = Counter()
        self.begun = {block: threading.Event() for block in range(4)}
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, block: int):
        self.count[block] += 1
        self.begun[block].set()
        assert self.gate.wait(PATIENCE)
        if block == 3:
            raise InputError("block 3 is not there")
        yield from ((name, torch.full((2,), block)) for name in "ab")


def numbers(tensors) -> set[tuple[str, int]]:
    return {(name, int(one[0])) for name, one in tensors}


def test_the_next_block_is_read_while_nobody_asks_for_it_and_only_once():
    reads = Reads()
    ahead = Ahead(reads, pinned=False)
    assert numbers(ahead.take(0)) == {("a", 0), ("b", 0)}
    ahead.begin(1)
    assert reads.begun[1].wait(PATIENCE)
    assert numbers(ahead.take(1)) == {("a", 1), ("b", 1)}
    assert reads.count == {0: 1, 1: 1}


def test_a_block_that_is_still_on_its_way_is_waited_for():
    reads = Reads()
    ahead = Ahead(reads, pinned=False)
    numbers(ahead.take(0))
    ahead.begin(1)
    assert reads.begun[1].wait(PATIENCE)
    reads.gate.clear()
    numbers(ahead.take(1))
    ahead.begin(2)
    assert reads.begun[2].wait(PATIENCE)
    threading.Timer(0.05, reads.gate.set).start()
    assert numbers(ahead.take(2)) == {("a", 2), ("b", 2)}
    assert reads.count[2] == 1


def test_another_block_than_was_guessed_is_read_itself():
    reads = Reads()
    ahead = Ahead(reads, pinned=False)
    numbers(ahead.take(1))
    ahead.begin(2)
    assert numbers(ahead.take(0)) == {("a", 0), ("b", 0)}
    assert numbers(ahead.take(2)) == {("a", 2), ("b", 2)}


def test_an_error_ahead_is_that_of_who_asks_for_the_block():
    ahead = Ahead(Reads(), pinned=False)
    assert numbers(ahead.take(2)) == {("a", 2), ("b", 2)}
    ahead.begin(3)
    with pytest.raises(InputError, match="block 3"):
        ahead.take(3)


def test_a_tensor_is_let_go_of_once_the_next_one_is_asked_for():
    ahead = Ahead(Reads(), pinned=False)
    list(ahead.take(0))
    ahead.begin(1)
    tensors = ahead.take(1)
    gone = weakref.ref(next(tensors)[1])
    next(tensors)
    assert gone() is None


def write_model(tmp_path) -> Checkpoint:
    return Checkpoint(state_of(write_tiny_model(tmp_path / "model", "llama", layers=3)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_blocks_of_a_model_are_the_same_and_read_once_in_both_directions(tmp_path, monkeypatch, order):
    checkpoint, read = write_model(tmp_path), Counter()
    whole = checkpoint.read_block

    def counted(block):
        read[block] += 1
        return whole(block)

    monkeypatch.setattr(checkpoint, "read_block", counted)
    decoder, step = Decoder(checkpoint, torch.float32, 8), order[1] - order[0]
    for block in order:
        ahead = decoder.block(block).state_dict()
        decoder.read_ahead(block + step)
        alone = decoder.block_of(block, whole(block)).state_dict()
        assert ahead.keys() == alone.keys()
        assert all(torch.equal(ahead[name], one) for name, one in alone.items())
    assert read == dict.fromkeys(order, 1)  # and nothing beyond the ends


@pytest.mark.gpu
def test_on_a_gpu_what_is_read_ahead_comes_from_page_locked_memory(tmp_path):
    checkpoint = write_model(tmp_path)
    ahead = Ahead(checkpoint.read_block, pinned=True)
    list(ahead.take(0))
    ahead.begin(1)
    assert all(one.is_pinned() for _, one in ahead.take(1))
    decoder = Decoder(checkpoint, torch.float32, 8, "cuda")
    for block in range(3):
        found = decoder.block(block).state_dict()
        decoder.read_ahead(block + 1)
        assert all(torch.equal(found[name].cpu(), one.float()) for name, one in checkpoint.read_block(block))
