"""The journal: what is recorded is not done again, and what is no record is."""

import pytest
from pydantic import BaseModel
from structlog.testing import capture_logs

from cluster.storage import open_store
from workflows.events import ignore
from workflows.steps import Journal


class Sum(BaseModel):
    """A step's result."""

    value: int


def add(journal: Journal, calls: list[int]) -> int:
    def work(work) -> Sum:
        calls.append(1)
        return Sum(value=3)

    return journal.step("add", {"of": [1, 2]}, Sum, work).value


def test_a_recorded_step_is_not_done_again(tmp_path):
    store, calls = open_store(str(tmp_path)), []
    with capture_logs() as logs:
        assert [add(Journal(store, "run", ignore), calls) for _ in range(3)] == [3, 3, 3]
    assert (len(calls), logs) == (1, [])


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b"null", b"[]", b"5", b"\xff", b"{}", b'{"seconds": 1}', b'{"seconds": "x", "result": {"value": 3}}',
     b"[" * 100_000],
)  # fmt: skip
def test_a_broken_record_is_told_and_the_step_is_done_again(tmp_path, broken):
    store, calls = open_store(str(tmp_path)), []
    add(Journal(store, "run", ignore), calls)
    (key,) = store.keys("runs/run/steps/")
    whole = store.get(key)
    store.put(key, broken)
    with capture_logs() as logs:
        assert add(Journal(store, "run", ignore), calls) == 3
    assert len(calls) == 2
    assert [(one["log_level"], one["key"]) for one in logs] == [("warning", key)]
    assert store.size(key) == pytest.approx(len(whole), abs=8), "it is a whole record again"
