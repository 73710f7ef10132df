"""How long the engine goes on with other machines. Losing them for real is the chaos suite's part."""

from contextlib import nullcontext

import pytest

from cluster import gangs as made_of_machines
from cluster import layerwise
from cluster.gangs import GANGS
from cluster.layerwise import run_blocks
from cluster.losses import MachinesLost
from cluster.spec import ClusterSpec
from cluster.storage import Stored


class FourBlocks:
    block_count = 4
    shard_count = 1


@pytest.fixture
def gangs(monkeypatch):
    """Gangs of no machines, each of which finishes as many blocks as is said, and is lost then."""

    def play(*finishing: int) -> tuple[list[int], list[int]]:
        told: list[int] = []
        begun: list[int] = []
        script = iter(finishing)

        def attempt(work, group, spec, blocks, note, stop):
            begun.append(len(blocks))
            for _ in range(next(script)):
                note(len(blocks), Stored(key=f"{len(blocks)}", sha256="0" * 64, size=1))
            if len(blocks) < work.block_count:
                raise MachinesLost("gone", "again")

        monkeypatch.setattr(layerwise, "_attempt", attempt)
        monkeypatch.setattr(made_of_machines, "gang", lambda spec, cpus, stop: nullcontext())
        run_blocks(FourBlocks(), ClusterSpec(), 1, [], lambda block, stored: told.append(block), lambda: False)
        return begun, told

    return play


def test_another_gang_goes_on_at_the_block_at_hand_and_no_block_is_told_twice(gangs):
    assert gangs(1, 0, 0, 1, 0, 2) == ([0, 1, 1, 1, 2, 2], [0, 1, 2, 3])


def test_gangs_that_finish_nothing_are_not_tried_for_ever(gangs):
    with pytest.raises(MachinesLost):
        gangs(1, *[0] * GANGS, 3)
    with pytest.raises(MachinesLost):
        gangs(*[0] * GANGS, 4)
