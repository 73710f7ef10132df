"""What is refused before a byte of a foreign model is used, each with the file and the field."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from cluster.errors import InputError
from cluster.storage import Store
from workflows.models.safetensors_header import read_header

ARCHITECTURES = {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
}  # fmt: skip
LARGEST_JSON = {"config.json": 1 << 20, "model.safetensors.index.json": 64 << 20}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(store: Store) -> dict[str, Any]:
    """The model's config.json, if it describes a model that can be compressed.

    Raises:
        InputError: not there, no JSON, remote code, quantised, or an architecture that is not covered.
    """
    config = read_json(store, "config.json")
    where = f"{store.uri}: config.json"
    for field in ("auto_map", "custom_pipelines", "trust_remote_code"):
        if config.get(field):
            raise InputError(f"{where}: {field}: the model asks for code of its own, which is never run")
    if config.get("quantization_config"):
        raise InputError(f"{where}: quantization_config: a quantised model cannot be pruned; give the unquantised one")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise InputError(
            f"{where}: architectures: {architectures} is not covered; covered: {', '.join(sorted(ARCHITECTURES))}"
        )
    for field in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        if type(config.get(field)) is not int or config[field] < 1:
            raise InputError(f"{where}: {field}: {config.get(field)!r} is no number of at least 1")
    return config


def weight_files(store: Store, names: Mapping[str, int]) -> list[str]:
    """The safetensors files that hold the weights, each looked into.

    Args:
        store: the model's directory.
        names: its files and their sizes.

    Raises:
        InputError: there are none, one is missing, is a pickle in disguise, or lies about its content.
    """
    if INDEX in names:
        index = read_json(store, INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise InputError(f"{store.uri}: {INDEX}: weight_map is no map of tensors to files")
        files = sorted(set(index.values()))
        for file in files:
            if "/" in file or "\\" in file or not file.endswith(".safetensors"):
                raise InputError(f"{store.uri}: {INDEX}: names {file!r}; a shard is a .safetensors file beside it")
            if file not in names:
                raise InputError(f"{store.uri}: {INDEX}: names {file}, which is missing")
    elif SINGLE in names:
        index, files = None, [SINGLE]
    else:
        pickled = [name for name in names if name.endswith(PICKLED)]
        what = f"only pickles ({', '.join(pickled[:3])}), which can run code" if pickled else "no weights"
        raise InputError(
            f"{store.uri}: {what}; safetensors are needed",
            "Save it with save_pretrained(..., safe_serialization=True).",
        )
    found: dict[str, str] = {}
    for file in files:
        refuse_pickle(store, file)
        try:
            tensors = read_header(partial(store.read, file), names[file]).tensors
        except InputError as error:
            raise InputError(f"{store.uri}: {file}: {error.message}") from error
        found |= dict.fromkeys(tensors, file)
    if index is not None and index != found:
        wrong = sorted(set(index.items()) ^ set(found.items()))[0][0]
        raise InputError(f"{store.uri}: {INDEX}: tensor {wrong} is not where the index says")
    return files


def refuse_pickle(store: Store, file: str) -> None:
    """Looks at the first bytes: a pickle (bare or in a zip) is refused whatever its name.

    Raises:
        InputError: names the file.
    """
    first = store.read(file, 0, min(4, store.size(file) or 0))
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and not _small_header(
        store, file
    ):
        raise InputError(
            f"{store.uri}: {file}: is a pickle, which can run code when it is loaded; safetensors are needed"
        )


def _small_header(store: Store, file: str) -> bool:
    """Whether the bytes that look like a pickle's are in truth the length of a safetensors header."""
    return (store.size(file) or 0) > 9 and store.read(file, 4, 5) == b"\0\0\0\0{"


def read_json(store: Store, file: str) -> dict[str, Any]:
    """A JSON object of bounded size, without NaN.

    Raises:
        InputError: missing, too large, or no such JSON.
    """
    size = store.size(file)
    if size is None:
        raise InputError(f"{store.uri}: {file} is missing: this is no Hugging Face model")
    if size > LARGEST_JSON[file]:
        raise InputError(f"{store.uri}: {file}: {size} bytes is too large")
    try:
        found = json.loads(store.get(file), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{store.uri}: {file}: no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{store.uri}: {file}: no JSON object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
