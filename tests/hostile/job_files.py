"""Job files: YAML that attacks its reader, and fields that attack what comes after."""

from pathlib import Path
from typing import Any

import yaml
from hostile.cases import CANARY, Case, file

from jobs.job import read_job

GOOD: dict[str, Any] = {
    "name": "chat",
    "model": "some/dir",
    "target": {"pattern": "2:4", "sparsity": 0.5},
    "publish": {"to": "/tmp/x"},
}
TEXT = yaml.safe_dump(GOOD)


def raw(name: str, content: bytes | str, *mentions: str) -> Case:
    """A job file of exactly this content."""
    return Case(name, lambda folder: file(folder, "job.yaml", content), read_job, ("job.yaml", *mentions))


def changed(name: str, changes: dict[str, Any], *mentions: str) -> Case:
    """A good job file with some fields changed."""
    return raw(name, yaml.safe_dump(GOOD | changes, allow_unicode=True), *mentions)


def lines(name: str, more: str, *mentions: str) -> Case:
    """A good job file with lines added as they are: what YAML makes of a value is the point."""
    return raw(name, TEXT + more + "\n", *mentions)


def in_place_of(name: str, field: str, value: str, *mentions: str) -> Case:
    """A good job file with one top-level field written as it is."""
    return raw(name, yaml.safe_dump({k: v for k, v in GOOD.items() if k != field}) + f"{field}: {value}\n", *mentions)


def laughs(levels: int) -> str:
    rows = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(rows)


def special(path: str) -> Case:
    return Case(
        f"the job file is {path[:30]!r}", lambda folder: Path(path), read_job, (path[:30].replace("\0", "\\x00"),)
    )


CASES = [
    # YAML itself
    raw("billion laughs", laughs(9), "aliases"),
    raw("billion laughs within the number of aliases", laughs(5), "job.yaml"),
    raw("an alias of itself", "a: &a [*a]", "job.yaml"),
    raw("deep flow lists", "a: " + "[" * 3000, "YAML"),
    raw("deep flow maps, closed", "a: " + "{a: " * 90 + "1" + "}" * 90, "YAML"),
    raw("deep block lists", "a:\n" + "\n".join(" " * i + "-" for i in range(1, 400)), "YAML"),
    raw("very many values", "a:\n" + "- 1\n" * 60_000, "YAML"),
    raw("very many keys", "".join(f"k{i}: 1\n" for i in range(20_000)), "YAML"),
    raw("very many empty flow lists", "a: [" + "[]," * 60_000 + "]", "YAML"),
    raw("very many documents", "---\n" * 40_000, "YAML"),
    raw("two documents", TEXT + "---\n" + TEXT, "YAML"),
    raw("one very long key", "? " + "k" * 200_000 + "\n: 1", "job.yaml"),
    raw("a long row of question marks", "? " * 60_000, "job.yaml"),
    raw("a long row of anchors", "&a " * 60_000, "job.yaml"),
    raw("a long row of tags", "!a " * 60_000, "job.yaml"),
    raw("a long row of quotes", '"' * 200_001, "job.yaml"),
    raw("a long row of colons", ": " * 100_000, "job.yaml"),
    raw("a long comment line", "#" * 250_000, "mapping"),
    raw("a megabyte", "#" * (1 << 20), "larger than"),
    raw("os.system by a tag", f"a: !!python/object/apply:os.system ['touch {CANARY}']", "python/object/apply"),
    raw("eval by a tag", f"a: !!python/object/apply:eval [\"open('{CANARY}', 'w')\"]", "python/object/apply"),
    raw("a new object by a tag", "!!python/object/new:os.system [true]", "python/object/new"),
    raw("a module by a tag", "a: !!python/module:antigravity", "python/module"),
    raw("a name by a tag", "a: !!python/name:os.system", "python/name"),
    raw("a tag of one's own", "a: !include /etc/passwd", "!include"),
    raw("binary by a tag", TEXT + "seed: !!binary aGVsbG8=", "seed"),
    raw("a set by a tag", TEXT + "stages: !!set {a, b}", "stages"),
    raw("an ordered map by a tag", TEXT + "stages: !!omap [a: 1]", "stages"),
    raw("a merge key of a list", "<<: [1]\n" + TEXT, "YAML"),
    raw("a merge key that brings an unknown field", TEXT + "<<: {colour: red}", "YAML"),
    raw("a key twice", TEXT + "name: other", "'name' is given twice"),
    raw("a nested key twice", TEXT + "solver: {name: wanda, name: magnitude}", "'name' is given twice"),
    raw("a list as key", "? [a]\n: b", "a key must be plain"),
    raw("a number as key", TEXT + "1: 2", "job.yaml: 1: "),
    raw("an empty file", b"", "mapping"),
    raw("only blanks", b" \n\n", "mapping"),
    raw("a list", "- a", "mapping"),
    raw("a word", "a", "mapping"),
    raw("latin-1", TEXT.encode() + b"tenant: caf\xe9", "cannot be read"),
    raw("utf-16", TEXT.encode("utf-16"), "cannot be read"),
    raw("random bytes", bytes(range(256)), "cannot be read"),
    raw("a zip", b"PK\x03\x04" + TEXT.encode(), "YAML"),
    raw("a NUL", TEXT + "tenant: a\0b", "YAML"),
    raw("an escape character", TEXT + "tenant: a\x1b[2Jb", "YAML"),
    raw("half a surrogate pair", TEXT + "tenant: \ud800", "cannot be read"),
    raw("half a surrogate pair, escaped", TEXT + 'hardware: "\\ud800"', "hardware"),
    raw("a tab for indentation", "target:\n\tpattern: ffn", "YAML"),
    raw("an unknown directive", "%FOO bar\n---\n" + TEXT + "colour: 1", "colour"),
    raw("yaml 9", "%YAML 9.0\n---\n" + TEXT, "YAML"),
    # numbers
    in_place_of("a pattern read as base 60", "target", "{pattern: 2:4, sparsity: 0.5}", "2:4"),
    lines("a seed in base 60", "seed: 1:30", "1:30"),
    lines("a seed in octal", "seed: 0777", "0777"),
    lines("a seed in hex", "seed: 0xFF", "0xFF"),
    lines("a seed in binary", "seed: 0b11", "0b11"),
    lines("a seed with underscores", "seed: 1_000", "1_000"),
    lines("an infinite seed", "seed: .inf", "seed"),
    lines("a seed of nan", "seed: .nan", "seed"),
    lines("a negative seed", "seed: -1", "seed"),
    lines("a huge seed", "seed: " + "9" * 4000, "seed"),
    lines("a seed beyond Python's digits", "seed: " + "9" * 5000, "YAML"),
    lines("a seed of a date", "seed: 2026-11-24", "seed"),
    lines("a date as tenant", "tenant: 2026-11-24", "tenant"),
    lines("an impossible date", "tenant: 2026-13-45", "YAML"),
    lines("yes for a seed", "seed: yes", "seed"),
    lines("true for workers", "cluster: {workers: true}", "cluster.workers"),
    lines("on for GPUs", "cluster: {gpus_per_worker: on}", "cluster.gpus_per_worker"),
    lines("true for a share", "data: {evaluation: {source: a.txt, part: [false, true]}}", "data.evaluation.part"),
    lines("true for traffic", "traffic: {requests_per_day: true}", "traffic.requests_per_day"),
    lines("true for a gate", "gates: {perplexity_increase: true}", "gates.perplexity_increase"),
    lines("a number for a flag", "stages: [{sparsity: 0.5, tune: {distill: 7}}]", "distill"),
    lines("true for a ZeRO stage", "stages: [{sparsity: 0.5, tune: {zero: true}}]", "zero"),
    lines("null as tenant", "tenant: ~", "tenant"),
    lines("1e999 for a wait", "cluster: {wait_seconds: 1.0e+999}", "cluster.wait_seconds"),
    lines("1e999 as text for a wait", "cluster: {wait_seconds: 1e999}", "cluster.wait_seconds"),
    lines("infinity for a wait", "cluster: {wait_seconds: .inf}", "cluster.wait_seconds"),
    lines("infinite GPUs", "cluster: {gpus_per_worker: .inf}", "cluster.gpus_per_worker"),
    lines("GPUs of nan", "cluster: {gpus_per_worker: .nan}", "cluster.gpus_per_worker"),
    lines("a million workers", "cluster: {workers: 1000000}", "cluster.workers"),
    lines("infinite traffic", "traffic: {requests_per_day: .inf}", "traffic.requests_per_day"),
    lines("a gate of infinity", "gates: {perplexity_increase: .inf}", "gates.perplexity_increase"),
    lines("a gate of nan", "gates: {worst_slice_increase: .nan}", "gates.worst_slice_increase"),
    lines("a window of a billion tokens", "data: {evaluation: {source: a.txt, length: 1000000000}}", "data.evaluation.length"),
    lines("a billion shards", "data: {shards: 1000000000}", "data.shards"),
    changed("a pattern of huge numbers", {"target": {"pattern": "1:" + "9" * 5000, "sparsity": 0.5}}, "target.pattern"),
    changed("a pattern in other digits", {"target": {"pattern": "٢:٤", "sparsity": 0.5}}, "target.pattern"),
    changed("stages as a word", {"stages": "many"}, "stages"),
    changed("stages as a map", {"stages": {"sparsity": 0.5}}, "stages"),
    changed("a list for a number", {"seed": [1]}, "seed"),
    changed("a list for text", {"model": ["a"]}, "model"),
    changed("a map for text", {"hardware": {"name": "x"}}, "hardware"),
    changed("text for a map", {"cluster": "big"}, "cluster"),
    changed("a thousand stages that do not rise", {"stages": [{"sparsity": 0.5} for _ in range(1000)]}, "stages"),
    # names, paths and addresses
    *(
        changed(f"a {field} of {what}", {field: value}, f"{field}:")
        for field in ("name", "tenant")
        for what, value in {
            "dots": "..", "a way out": "../evil", "an absolute path": "/etc", "a newline": "a\nb", "a last newline": "a\n",
            "a NUL": "a\0b", "look-alikes": "сhat", "a zero-width space": "ch\u200bat", "blanks": "a b", "nothing": "",
            "percent signs": "%2e%2e", "shell code": "$(id)", "an option": "--help", "capitals": "Chat", "length": "a" * 64,
        }.items()
    ),
    *(
        changed(f"{what} in {field}", change, field)
        for field, put in {
            "model": lambda value: {"model": value},
            "hardware": lambda value: {"hardware": value},
            "publish.to": lambda value: {"publish": {"to": value}},
            "cluster.address": lambda value: {"cluster": {"address": value}},
            "data.evaluation.source": lambda value: {"data": {"evaluation": {"source": value}}},
        }.items()
        for what, value in {
            "a NUL": "a\0b.txt", "a newline": "a\nb.txt", "an escape sequence": "a\x1b[2Jb.txt",
            "reversed text": "a\u202etxt.exe", "a path without end": "a" * 5000,
        }.items()
        for change in [put(value)]
    ),
    changed("a version that leads out", {"publish": {"to": "/tmp/x", "version": "../1"}}, "publish.version"),
    changed("a version with a newline", {"publish": {"to": "/tmp/x", "version": "1\n"}}, "publish.version"),
    changed("a version of dots", {"publish": {"to": "/tmp/x", "version": ".."}}, "publish.version"),
    changed("a version that is a number", {"publish": {"to": "/tmp/x", "version": 1.5}}, "publish.version"),
    changed("nowhere to publish", {"publish": {"to": ""}}, "publish.to"),
    special("/dev/zero"),
    special("/dev/urandom"),
    special("/proc/self/mem"),
    special("/"),
    special("/no/such/job.yaml"),
    special("/tmp/" + "a" * 5000),
    special("a\0b"),
]  # fmt: skip
