"""Properties of our own formats: damaged bytes are refused by our own errors, and no number may be NaN."""

import contextlib
import math
from typing import Any

import pytest
import yaml
from hostile.formats import FORMATS, JOB
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from cluster.errors import InputError
from jobs.job import Job, explain, parse_job


@pytest.mark.parametrize("name", FORMATS)
def test_good_bytes_are_taken(name):
    assert FORMATS[name].read(FORMATS[name].good) is not None


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_bytes_are_read_or_refused(name):
    form = FORMATS[name]

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def property_holds(data):
        content = bytearray(form.good)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content)))
            content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        try:
            form.read(bytes(content))
        except form.refusals:
            return

    property_holds()


def numbers(model: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Paths of all fields of a job that hold a number, alone or among others."""
    found = []
    for name, field in model.model_fields.items():
        here = (*path, name)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is not None:
            found += numbers(inner, here)
        elif any("int" in str(kind) or "float" in str(kind) or "Literal[1" in str(kind) for kind in kinds):
            found.append(here)
    return found


NUMBERS = numbers(Job)


def test_all_numbers_are_found():
    assert len(NUMBERS) >= 30
    assert ("stages", "tune", "learning_rate") in NUMBERS


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_no_number_may_be_something_else(path):
    for bad in (math.nan, math.inf, -math.inf, True, False, -1, 10**400, "many", [], {}, "\ud800", "1\x00"):
        job = yaml.safe_load(JOB)
        inner: Any = bad
        for name in reversed(path[1:]):
            inner = {name: inner}
        if path[0] == "stages":  # a list of them; the last one's
            inner = [job["stages"][0], job["stages"][1] | inner]
        elif isinstance(inner, dict) and path[0] in job:
            inner = job[path[0]] | inner
        if path[:1] == ("data",) and len(path) == 3:
            inner[path[1]] |= {"source": "some.txt"}
        job[path[0]] = inner
        with pytest.raises(InputError) as refusal:
            job_from(job)
        assert path[-1] in refusal.value.message


def job_from(content: dict[str, Any]) -> Job:
    """A job of plain values, through the same checks as a file's."""
    try:
        return Job.model_validate(content)
    except ValidationError as error:
        raise InputError(explain(error, "job.yaml")) from error


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(Job.model_fields)), VALUES)
def test_any_plain_value_in_any_field_is_taken_or_refused(field, value):
    text = yaml.safe_dump(yaml.safe_load(JOB) | {field: value})
    with contextlib.suppress(InputError):
        assert parse_job(text, "job.yaml")
