"""Our own formats as functions from bytes, each with a good example: for property tests and for the fuzzer.

A parser may only end in a value or in one of `REFUSALS`; anything else that it raises is a bug.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import safetensors.torch
import torch
import yaml

from cluster.errors import KarikomiError
from jobs.job import dump_job, parse_job
from jobs.records import Ended, Progress, Record, Started, Usage
from workflows.formats.compact import pack_bytes, unpack_bytes
from workflows.models.safetensors_header import read_header
from workflows.models.strict_json import strict_json
from workflows.release import Manifest, Object, Pointer

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
OBJECT = Object(key="config.json", sha256="0" * 64, size=2)
JOB = yaml.safe_dump(
    {
        "name": "chat",
        "model": "some/dir",
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "stages": [{"sparsity": 0.3}, {"sparsity": 0.5, "tune": {"steps": 3}}],
        "publish": {"to": "/tmp/x"},
    }
)


@dataclass(frozen=True)
class Format:
    """One of our formats.

    Attributes:
        read: parses bytes, and checks that what came out can be written and read again as the same.
        good: bytes that it takes.
        refusals: what it may raise instead.
    """

    read: Callable[[bytes], object]
    good: bytes
    refusals: tuple[type[Exception], ...] = (KarikomiError,)


def job(content: bytes) -> object:
    found = parse_job(content.decode("utf-8", "surrogateescape"), "job.yaml")
    assert parse_job(dump_job(found).decode(), "again") == found
    return found


def header(content: bytes) -> object:
    found = read_header(lambda start, length: content[start : start + length], len(content))
    assert all(8 <= one.start <= one.end <= len(content) for one in found.tensors.values())
    return found


def archive(content: bytes) -> object:
    whole = unpack_bytes(content)
    assert len(whole) <= 64 * len(content) + 1024, "a bounded bomb"
    header(whole)
    assert unpack_bytes(pack_bytes(whole)) == whole
    return whole


def record(kind: type[Record]) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        found = kind.model_validate_json(content)
        assert kind.model_validate_json(found.model_dump_json()) == found
        return found

    return read


def released(kind: type[Pointer] | type[Manifest]) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        found = kind.model_validate_json(content)
        assert kind.model_validate_json(found.model_dump_json()) == found
        return found

    return read


def tensors() -> bytes:
    weight = torch.zeros(16, 8, dtype=torch.bfloat16)
    weight[::4] = 1
    return safetensors.torch.save({"w": weight, "n": torch.ones(4)}, {"format": "pt"})


POINTER = Pointer(
    name="chat", version="1", digest="0" * 64, manifest=OBJECT, run="r", nonce="n", created="now", karikomi="0"
)
FORMATS = {
    "job": Format(job, JOB.encode()),
    "header": Format(header, tensors()),
    "archive": Format(archive, pack_bytes(tensors()), (ValueError,)),
    "json": Format(strict_json, json.dumps({"a": [1, 2.5, "x", None, {"b": True}]}).encode(), (ValueError,)),
    "pointer": Format(released(Pointer), POINTER.model_dump_json().encode(), (ValueError,)),
    "manifest": Format(
        released(Manifest),
        Manifest(name="c", digest="0" * 64, format="f", files={"a": OBJECT}).model_dump_json().encode(),
        (ValueError,),
    ),
    "started": Format(
        record(Started),
        Started(run="c-1", number=1, tenant="t", name="c", by="a@b", cluster="e", at=NOW).model_dump_json().encode(),
        (ValueError,),
    ),
    "progress": Format(record(Progress), Progress(at=NOW, step="prune").model_dump_json().encode(), (ValueError,)),
    "ended": Format(
        record(Ended),
        Ended(at=NOW, code=0, result="done", sentence="x", usage=Usage(seconds=1)).model_dump_json().encode(),
        (ValueError,),
    ),
}
