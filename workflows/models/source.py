"""Where a model comes from, what of it is read, and what it is known by."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.disk import room_needed
from cluster.errors import InputError, Unavailable
from cluster.storage import Store, Stored, open_store
from workflows.models import gguf
from workflows.models.digests import digests
from workflows.models.safety import INDEX, read_config, read_json, refuse_code, weight_files

TEXT_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
LARGEST_TEXT = 256 << 20  # bytes of a tokenizer file
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")


class Source(BaseModel):
    """A dense model, ready to be read.

    Attributes:
        uri: directory or s3:// prefix of a stock Hugging Face checkpoint.
        config: its config.json.
        weights: its safetensors files.
        others: its tokenizer and generation files, taken over into releases as they are.
        digest: sha256 over names and digests of weights, config and tokenizer.
    """

    model_config = ConfigDict(frozen=True)

    uri: str
    config: dict[str, Any]
    weights: tuple[Stored, ...]
    others: tuple[str, ...]
    digest: str


def resolve_source(model: str, cache: Path) -> Source:
    """Finds a model, refuses what is unsafe or not covered, and takes its digest.

    Args:
        model: directory, s3:// prefix, hub id or .gguf file.
        cache: where converted and downloaded models are kept, and the digests of files that were read once.

    Raises:
        InputError: missing, unsafe or not covered; names the file and field.
        Unavailable: the store is out of reach.
    """
    store = _store(model, cache)
    config, weight_sizes, others = _looked_at(store)
    weights = digests(store, weight_sizes, cache)
    named = {one.key: one.sha256 for one in weights} | {
        name: hashlib.sha256(store.get(name)).hexdigest() for name in ("config.json", *others)
    }
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    return Source(uri=store.uri, config=config, weights=weights, others=others, digest=digest)


def config_of(model: str, cache: Path) -> dict[str, Any]:
    """A model's config.json, after the same looks that `resolve_source` takes; of the weights only headers are read.

    Raises:
        InputError, Unavailable: as `resolve_source`.
    """
    return _looked_at(_store(model, cache))[0]


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer; one on S3 is fetched into a directory that lives as long as this call."""
    import tempfile

    from transformers import AutoTokenizer

    store = open_store(source.uri)
    with room_needed(f"{tempfile.gettempdir()} (temporary files)"), tempfile.TemporaryDirectory() as directory:
        for name in ("config.json", *source.others):
            (Path(directory) / name).write_bytes(store.get(name))
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers promises nothing of what it raises for bad files
            raise InputError(f"{source.uri}: its tokenizer files cannot be read: {error}") from error
    if tokenizer.vocab_size > source.config["vocab_size"]:
        raise InputError(
            f"{source.uri}: the tokenizer has {tokenizer.vocab_size} words, config.json's vocab_size is "
            f"{source.config['vocab_size']}: it is another model's"
        )
    return tokenizer


def _looked_at(store: Store) -> tuple[dict[str, Any], dict[str, int], tuple[str, ...]]:
    """Its config, the sizes of its weight files by name, and its other files: all safe, covered and fitting."""
    from workflows.models.fitting import check_fits  # torch and transformers are not needed to know of a Source

    names = _names(store)
    config = read_config(store)
    sizes = {name: size for name in names if (size := store.size(name)) is not None}
    files = weight_files(store, sizes)
    check_fits(config, files, store.uri)
    others = tuple(name for name in TEXT_FILES if name in sizes)
    _check_others(store, {name: sizes[name] for name in others})
    return config, {name: sizes[name] for name in files}, others


def _store(model: str, cache: Path) -> Store:
    try:
        return open_store(_location(model, cache))
    except InputError as error:
        message = error.message if error.message.startswith("model:") else f"model: {error.message}"
        raise InputError(message, error.hint) from error


def _location(model: str, cache: Path) -> str:
    if model.startswith("s3://"):
        return model
    try:
        path = Path(model).expanduser()
        if path.suffix == ".gguf":
            return str(gguf.converted(path, cache))
        if path.is_dir():
            return str(path.absolute())
    except (OSError, RuntimeError, ValueError) as error:  # too long, or the home of nobody
        raise InputError(f"model: {model} is no path: {error}") from error
    if HUB_ID.fullmatch(model) and not model.startswith((".", "/")):
        return _from_hub(model)
    raise InputError(f"model: {model} is not there: no directory, and no hub id (org/name)")


def _from_hub(model: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        wanted = ["*.safetensors", INDEX, "config.json", *TEXT_FILES]
        return str(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            raise InputError(f"model: {model}: the hub refuses: {error}") from error
        raise Unavailable(
            f"model: {model} is no directory here, and the hub is out of reach",
            "Give a directory, or run this where the hub can be reached.",
        ) from error
    except HFValidationError as error:
        raise InputError(f"model: {model}: {error}") from error


def _names(store: Store) -> list[str]:
    """The files directly in the model's directory.

    Raises:
        InputError: one that would be read is a link to a place outside of it. A run publishes tokenizer files as
            they are, with the rights of who runs it: a link would carry a file of theirs out. The hub's cache, which
            is made of links, is one place: `models--org--name`.
    """
    if store.uri.startswith("s3://"):
        return [key for key in store.keys("") if "/" not in key]
    directory = Path(store.uri)
    place = directory.resolve()
    place = place.parents[1] if place.parent.name == "snapshots" else place
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    for name in names:
        read = name in ("config.json", INDEX, *TEXT_FILES) or name.endswith(".safetensors")
        if read and not (directory / name).resolve().is_relative_to(place):
            raise InputError(
                f"{store.uri}: {name}: is a link to a place outside of the model's directory",
                "Give the directory that really holds the files, or copy them.",
            )
    return names


def _check_others(store: Store, sizes: dict[str, int]) -> None:
    """Tokenizer and generation files: there, of a sane size, and without code.

    Raises:
        InputError: they are not; names the file.
    """
    if not sizes.keys() & {"tokenizer.json", "tokenizer.model", "vocab.txt"}:
        raise InputError(f"{store.uri}: tokenizer.json is missing; a model is compressed with its tokenizer")
    for name, size in sizes.items():
        if size > LARGEST_TEXT:
            raise InputError(f"{store.uri}: {name}: {size} bytes is too large")
    if "tokenizer_config.json" in sizes:
        refuse_code(read_json(store, "tokenizer_config.json"), f"{store.uri}: tokenizer_config.json")
