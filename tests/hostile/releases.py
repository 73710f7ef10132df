"""Version pointers and manifests that lie, lead elsewhere, or are of somebody else; read by `pull`."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.cases import Case

from cluster.directory_store import DirectoryStore
from jobs.pulling import pull_release
from workflows.publishing import publish

FILES = {"config.json": b"{}", "model-outer.safetensors": b"weights" * 100}
CLAIMED = "0" * 64


def published(folder: Path) -> tuple[DirectoryStore, Path, dict[str, Any], Path, dict[str, Any]]:
    """A good release: its store, then pointer and manifest, each as file and content."""
    store = DirectoryStore(str(folder / "store"))
    files = {name: store.put(f"runs/r/{name}", content) for name, content in FILES.items()}
    publish(store, "chat", "1", files, {"REPORT.json": b"{}"}, "r")
    pointer = folder / "store/models/chat/versions/1.json"
    told = json.loads(pointer.read_text())
    manifest = folder / f"store/models/chat/{told['digest'][:12]}/{told['manifest']['key']}"
    return store, pointer, told, manifest, json.loads(manifest.read_text())


def pulled(store: Path) -> object:
    return pull_release(str(store), "chat@1", store.parent / "pulled")


def pointer_text(name: str, text: str | bytes, *mentions: str) -> Case:
    """A release whose pointer is this."""

    def build(folder: Path) -> Path:
        _, pointer, *_ = published(folder)
        pointer.write_bytes(text.encode() if isinstance(text, str) else text)
        return folder / "store"

    return Case(name, build, pulled, ("versions/1.json", *mentions))


def pointer(what: str, /, *mentions: str, **changes: Any) -> Case:
    """A release whose pointer has other fields; Ellipsis takes one away."""

    def build(folder: Path) -> Path:
        _, path, told, *_ = published(folder)
        path.write_text(json.dumps({k: v for k, v in (told | changes).items() if v is not ...}))
        return folder / "store"

    return Case(what, build, pulled, mentions or ("versions/1.json",))


def manifest(name: str, change: Callable[[dict[str, Any]], Any], *mentions: str) -> Case:
    """A release whose manifest was changed by somebody who also made digests fit as far as they can."""

    def build(folder: Path) -> Path:
        _, path, told, old, content = published(folder)
        changed = change(content)
        text = changed if isinstance(changed, bytes) else json.dumps(content if changed is None else changed).encode()
        key = f"MANIFEST.{hashlib.sha256(text).hexdigest()[:8]}.json"
        old.unlink()
        (old.parent / key).write_bytes(text)
        told["manifest"] = {"key": key, "sha256": hashlib.sha256(text).hexdigest(), "size": len(text)}
        if isinstance(content, dict) and isinstance(content.get("files"), dict):
            model = {k: v["sha256"] for k, v in content["files"].items() if isinstance(v, dict) and v.get("key") == k}
            digest = hashlib.sha256(json.dumps(model, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
            if content.get("digest") != CLAIMED and changed is None:  # the whole release moves to its new digest
                content["digest"] = digest
                text = json.dumps(content).encode()
                told |= {
                    "digest": digest,
                    "manifest": {"key": key, "sha256": hashlib.sha256(text).hexdigest(), "size": len(text)},
                }
                (old.parent / key).write_bytes(text)
                target = old.parent.with_name(digest[:12])
                if target != old.parent:
                    old.parent.rename(target)
        path.write_text(json.dumps(told))
        return folder / "store"

    return Case(name, build, pulled, mentions or ("manifest",))


def named(file: str, key: str | None = None) -> Callable[[dict[str, Any]], None]:
    """One more file, by this name; by default its object has the same."""

    def change(content: dict[str, Any]) -> None:
        content["files"][file] = content["files"]["config.json"] | {"key": file if key is None else key}

    return change


def stored(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """The weights' entry with other fields."""
    return lambda content: content["files"]["model-outer.safetensors"].update(changes)


def put(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(changes)


def object_changed(name: str, content: bytes, *mentions: str) -> Case:
    """A release one of whose files was replaced after it was published."""

    def build(folder: Path) -> Path:
        _, _, _, path, _ = published(folder)
        weights = path.parent / "model-outer.safetensors"
        weights.unlink()  # the run's own object is the same file
        weights.write_bytes(content)
        return folder / "store"

    return Case(name, build, pulled, ("model-outer.safetensors", *mentions))


def grown(folder: Path) -> Path:
    _, _, _, path, _ = published(folder)
    weights = path.parent / "model-outer.safetensors"
    weights.unlink()
    with weights.open("wb") as file:
        file.truncate(1 << 40)
    return folder / "store"


def asked(release: str) -> Case:
    """A release that is asked for by a strange name."""

    def build(folder: Path) -> Path:
        published(folder)
        return folder / "store"

    return Case(f"pull of {release[:30]!r}", build, lambda store: pull_release(str(store), release, store.parent / "pulled"), ("release",))  # fmt: skip


BAD_NAMES = {
    "a way out": "../evil", "an absolute path": "/tmp/evil", "a folder": "a/b.json", "a Windows path": "..\\evil",
    "a drive": "C:evil", "dots": "..", "a dot": ".", "nothing": "", "a NUL": "a\0b", "a newline": "a\nb",
    "an escape sequence": "a\x1b[2J", "a reserved device": "CON", "a reserved device with an ending": "nul.json",
    "a last dot": "config.json.", "a last blank": "config.json ", "a stream": "config.json:evil", "a hidden file": ".bashrc",
    "the manifest": "MANIFEST.json", "the manifest in small letters": "manifest.json", "another's capitals": "CONFIG.json",
    "look-alikes": "сonfig.json", "reversed text": "a\u202enosj.exe", "300 letters": "a" * 300, "an option": "-rf",
}  # fmt: skip
CASES = [
    # pointers
    pointer_text("an empty pointer", "", "pointer"),
    pointer_text("a pointer that is a list", "[]", "pointer"),
    pointer_text("a pointer of random bytes", bytes(range(256)), "pointer"),
    pointer_text("a pointer nested deep", '{"name":' * 100_000, "pointer"),
    pointer_text("a pointer of 20 MB", b'{"name": "' + b"a" * (20 << 20) + b'"}', "pointer"),
    pointer("a pointer with an unknown field", "colour", colour="red"),
    pointer("a pointer without a digest", "digest", digest=...),
    pointer("a pointer of another release", "other@1", name="other"),
    pointer("a pointer of another version", "chat@2", version="2"),
    pointer("a pointer whose version leads out", "../1", version="../1"),
    pointer("a pointer whose digest leads out", "digest", digest="../../../etc/xx"),
    pointer("a pointer whose digest is empty", "digest", digest=""),
    pointer("a pointer whose digest has a newline", "digest", digest="0" * 63 + "\n"),
    pointer("a pointer whose digest is a number", "digest", digest=5),
    pointer("a pointer to another model", "manifest", digest=CLAIMED),
    pointer("a pointer to no manifest", "manifest", manifest=None),
    *(
        pointer(f"a pointer to a manifest at {what}", "names a file", manifest={"key": key, "sha256": CLAIMED, "size": 1})
        for what, key in {"a way out": "../../x", "an absolute path": "/etc/passwd", "nothing": "", "a NUL": "a\0"}.items()
    ),
    pointer("a pointer to a manifest that is gone", "manifest", "gone", manifest={"key": "M.json", "sha256": CLAIMED, "size": 1}),
    pointer("a pointer to a manifest of another digest", "manifest", manifest={"key": "config.json", "sha256": CLAIMED, "size": 2}),
    pointer("a pointer to a manifest of negative size", "size", manifest={"key": "config.json", "sha256": CLAIMED, "size": -2}),
    pointer("a pointer to a manifest of 10^30 bytes", "size", manifest={"key": "config.json", "sha256": CLAIMED, "size": 10**30}),
    pointer("a pointer to a manifest with more to say", "extra", manifest={"key": "config.json", "sha256": CLAIMED, "size": 2, "extra": 1}),
    # manifests
    manifest("a manifest that is a list", lambda content: b"[]"),
    manifest("a manifest with half a surrogate pair", named("\ud800", "config.json"), "manifest"),
    manifest("a manifest cut short", lambda content: b'{"name": "chat"'),
    manifest("a manifest nested deep", lambda content: b'{"files":' * 100_000),
    manifest("a manifest with an unknown field", put(colour="red"), "manifest", "colour"),
    manifest("a manifest of another release", put(name="other"), "manifest"),
    manifest("a manifest of another model", put(digest=CLAIMED), "manifest"),
    manifest("a manifest whose files are a list", put(files=[]), "manifest", "files"),
    manifest("a manifest of no files", put(files={}), "manifest", "files"),
    manifest("a manifest of an unknown format", put(format="evil"), "format", "evil"),
    manifest("a manifest of a million files", lambda content: json.dumps(content | {"files": {f"f{i}": {"key": f"f{i}", "sha256": CLAIMED, "size": 1} for i in range(200_000)}}).encode(), "manifest"),
    manifest("a file of negative size", stored(size=-1), "size"),
    manifest("a file of 10^30 bytes", stored(size=10**30), "size"),
    manifest("a file's size as text", stored(size="many"), "size"),
    manifest("a file's size as a fraction", stored(size=1.5), "size"),
    manifest("a file of another size", stored(size=7), "model-outer.safetensors"),
    manifest("a file of another digest", stored(sha256=CLAIMED), "model-outer.safetensors", "sha256"),
    manifest("a digest that is none", stored(sha256="../x"), "sha256"),
    manifest("a file with more to say", stored(mode="0777"), "mode"),
    manifest("a file that is null", lambda content: content["files"].update({"config.json": None}), "config.json"),
    manifest("a file whose object leads out", named("evil.json", "../../../secret"), "../../../secret"),
    manifest("a file whose object is absolute", named("evil.json", "/etc/passwd"), "/etc/passwd"),
    manifest("a file that is gone", named("evil.json", "gone.json"), "gone.json"),
    *(manifest(f"a file named as {what}", named(file, "config.json"), "names a file" if "capitals" not in what and "the manifest" not in what else "two files") for what, file in BAD_NAMES.items()),
    # objects
    object_changed("weights that were changed", b"Weights" * 100, "sha256"),
    object_changed("weights that were cut short", b"weights", "bytes"),
    object_changed("weights that are empty", b"", "bytes"),
    Case("weights that grew to a TiB", grown, pulled, ("model-outer.safetensors", "bytes")),
    *map(asked, ("", "@", "chat@", "../chat", "chat@../1", "chat@1/../2", "Chat", "chat@1@2", "chat\n", "сhat", "a" * 300, "chat@" + "1" * 300, "chat\0", "chat@9", "-h")),
]  # fmt: skip
