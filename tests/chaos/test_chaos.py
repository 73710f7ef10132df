"""The part of the chaos suite that runs with every change; `benchmarks/chaos.py` runs all of it.

Oracle: the run ends with the digest of an undisturbed one, or refuses clearly and the same command gets there; nothing
finished is done again, nothing half-published is visible, nothing acknowledged is lost.
"""

import pytest
from kinds import KINDS
from small_disk import can_mount
from tally import Shown, table
from world import World

# Seeds per kind and place. A kind that is not named here runs with the benchmark alone.
WITH_EVERY_CHANGE = {
    "stores": {
        "publisher-directory": range(0, 60, 7),
        "publisher-s3": range(2, 48, 9),
        "network": [4],
        "disk": [1, 3],
    },
}
SLOW = {
    "engine": {
        "worker": [1],
        "worker-outside": [1],
        "worker-frozen": [1],
        "driver": [1],
        "two-drivers": [1],
        "engine-network": [1],
        "engine-disk": [1],
    },
    "nodes": {"node": [1], "node-frozen": [1]},
    "alone": {"object-store": [1]},
    "runs": {"run": [1], "two-runs": [1], "run-disk": [1]},
}


def cases(table: dict, *marks) -> list:
    return [
        pytest.param(place, kind, seed, id=f"{kind}-{seed}", marks=marks)
        for place, kinds in table.items()
        for kind, seeds in kinds.items()
        for seed in seeds
    ]


@pytest.fixture(scope="module")
def worlds(s3, request):
    """One world at a time: cases come in the order of their places."""
    opened: dict[str, World] = {}

    def world(place: str) -> World:
        if place not in opened:
            while opened:
                opened.popitem()[1].__exit__(None, None, None)
            opened[place] = World(s3).__enter__()
        return opened[place]

    with pytest.MonkeyPatch.context() as patch:  # cases point the environment at their proxy
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        yield world
        for one in opened.values():
            one.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("place", "kind", "seed"), [*cases(WITH_EVERY_CHANGE), *cases(SLOW, pytest.mark.slow, pytest.mark.timeout(1200))]
)
def test_a_fault_is_survived(worlds, place, kind, seed):
    if KINDS[kind].mounts and not can_mount():
        pytest.skip("needs the right to mount a small file system")
    shown = KINDS[kind].run(seed, worlds(place))
    assert shown.injected == shown.recovered + shown.resumed
    assert shown.injected, "nothing was struck, so this case showed nothing"


def test_every_class_of_fault_is_run_by_some_test():
    named = {kind for table in (WITH_EVERY_CHANGE, SLOW) for kinds in table.values() for kind in kinds}
    assert named == set(KINDS)
    assert all(
        KINDS[kind].where == place for table in (WITH_EVERY_CHANGE, SLOW) for place in table for kind in table[place]
    )


def test_the_table_adds_up():
    shown = [
        Shown(kind="a", seed=1, injected=2, recovered=1, resumed=1, seconds=(1, 3), worked=11, needed=10, requests=20),
        Shown(kind="b", seed=1, injected=1, recovered=1),
    ]
    lines = table(shown, {"a": "first", "b": "second", "c": "never run"}).splitlines()
    assert lines[2] == "| first | 1 | 2 | 1 | 1 | 10.0 % | 2.0 (3.0) | 10.0 |"
    assert lines[3] == "| second | 1 | 1 | 1 | 0 | – | – | – |"
    assert lines[4].startswith("| **all** | 2 | 3 | 2 | 1 |")
    assert len(lines) == 5
