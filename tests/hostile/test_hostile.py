"""Hostile and malformed inputs: each is refused at once, by name, and does nothing."""

import importlib
from pathlib import Path

import pytest
from hostile.cases import CANARY, Case, good_model
from hostile.watch import watching

from cluster.errors import KarikomiError

KINDS = (
    "job_files",
    "profiles",
    "model_directories",
    "weight_files",
    "ggufs",
    "data_files",
    "archives",
    "releases",
    "run_records",
    "tenants_files",
    "schedule_files",
)
CASES = [(kind, case) for kind in KINDS for case in importlib.import_module(f"hostile.{kind}").CASES]
LONGEST = 2.0  # seconds, on a slow machine at work on something else, too
LARGEST = 256 << 20  # bytes that a refusal may take at its peak


@pytest.fixture(scope="module", autouse=True)
def warm():
    """A refusal is timed in a process that has what it needs: libraries are imported, the good model is made."""
    good_model()
    import transformers.models.auto.modeling_auto  # noqa: F401


def files_below(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{kind}: {case.name}") for kind, case in CASES])
def test_refused_at_once_by_name_and_nothing_done(case: Case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argument = case.build(tmp_path)
    before = files_below(tmp_path)
    with watching(tmp_path) as seen, pytest.raises(KarikomiError) as refusal:
        case.read(argument)
    assert refusal.value.exit_code == 2
    for words in case.mentions:
        assert words in refusal.value.message
    assert refusal.value.message.isprintable() or "\n" in refusal.value.message
    assert len(refusal.value.message) < 5000
    assert seen.acts == []
    assert not CANARY.exists()
    assert files_below(tmp_path) == before
    assert seen.seconds < LONGEST
    assert seen.grown < LARGEST


def test_enough_of_them():
    assert len(CASES) >= 500
    assert len({(kind, case.name) for kind, case in CASES}) == len(CASES)
