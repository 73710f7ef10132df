"""What is refused before a byte of a foreign model is used, each with the file and the field."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from cluster.errors import InputError
from cluster.storage import Store
from workflows.models.expert_names import COUNTS, MIXTURES
from workflows.models.families import FAMILIES, most_tokens
from workflows.models.labels import check_labels
from workflows.models.safetensors_header import TensorInfo, read_header
from workflows.models.strict_json import strict_json

ARCHITECTURES = {family.architecture: model_type for model_type, family in FAMILIES.items()}
LARGEST_JSON = {"config.json": 1 << 20, "model.safetensors.index.json": 8 << 20, "tokenizer_config.json": 16 << 20}
CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
DEFAULTED = ("num_key_value_heads", "head_dim")
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", *DEFAULTED)
LARGEST_SIZE = 1 << 24
EXPERT_SIZES = (*COUNTS, "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
MOST_EXPERTS = 1 << 16  # in all blocks; the largest models have some 20 000
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
SINGLE = "model.safetensors"


def read_config(store: Store) -> dict[str, Any]:
    """The model's config.json, if it describes a model that can be compressed.

    Raises:
        InputError: not there, no JSON, remote code, quantised, or an architecture that is not covered.
    """
    config = read_json(store, "config.json")
    where = f"{store.uri}: config.json"
    refuse_code(config, where)
    if config.get("quantization_config"):
        raise InputError(f"{where}: quantization_config: a quantised model cannot be pruned; give the unquantised one")
    architectures = config.get("architectures")
    known = isinstance(architectures, list) and [one for one in ARCHITECTURES if architectures == [one]]
    if not known:
        raise InputError(
            f"{where}: architectures: {architectures} is not covered; covered: {', '.join(sorted(ARCHITECTURES))}"
        )
    if config.get("model_type") != ARCHITECTURES[known[0]]:
        raise InputError(
            f"{where}: model_type: {config.get('model_type')!r} is not that of {known[0]}, {ARCHITECTURES[known[0]]!r}"
        )
    for field in SIZES:
        value = config.get(field)
        if value is None and field in DEFAULTED:
            continue
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise InputError(f"{where}: {field}: {value!r} is no whole number from 1 to {LARGEST_SIZE}")
    if config["num_attention_heads"] % (config.get("num_key_value_heads") or 1):
        raise InputError(f"{where}: num_key_value_heads: they do not divide the attention heads into groups")
    if config["model_type"] in MIXTURES:
        _check_experts(config, where)
    if FAMILIES[config["model_type"]].classifies:
        _check_classifier(config, where)
    return config


def _check_classifier(config: Mapping[str, Any], where: str) -> None:
    """Whether a classifier is an encoder that knows its classes and where its words stand.

    Raises:
        InputError: names the field.
    """
    for field in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if config.get(field):
            raise InputError(f"{where}: {field}: a classifier that is no plain encoder is not covered")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(
            f"{where}: position_embedding_type: {config['position_embedding_type']!r} is not covered; 'absolute' is"
        )
    for field in ("max_position_embeddings", "type_vocab_size"):
        value = config.get(field)
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise InputError(f"{where}: {field}: {value!r} is no whole number from 1 to {LARGEST_SIZE}")
    padding = config.get("pad_token_id")
    if padding is not None and (type(padding) is not int or not 0 <= padding < config["vocab_size"]):
        raise InputError(f"{where}: pad_token_id: {padding!r} is none of the {config['vocab_size']} words")
    if most_tokens(config) < 8:
        raise InputError(
            f"{where}: max_position_embeddings: {config['max_position_embeddings']} leaves no room for text"
        )
    check_labels(config, where)


def _check_experts(config: Mapping[str, Any], where: str) -> None:
    """Whether every block has the same sane number of experts.

    Raises:
        InputError: names the field.
    """
    given = [field for field in EXPERT_SIZES if field in config]
    for field in given:
        value = config[field]
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise InputError(f"{where}: {field}: {value!r} is no whole number from 1 to {LARGEST_SIZE}")
    counts = {field: config[field] for field in COUNTS if field in given}
    if len(set(counts.values())) != 1:
        raise InputError(f"{where}: {' and '.join(COUNTS)}: one number of experts is needed, not {counts}")
    (count,) = set(counts.values())
    if count * config["num_hidden_layers"] > MOST_EXPERTS:
        raise InputError(f"{where}: {next(iter(counts))}: {count} in each block are more than {MOST_EXPERTS} in all")
    if config.get("num_experts_per_tok", 0) not in range(1, count + 1):
        raise InputError(f"{where}: num_experts_per_tok: {config.get('num_experts_per_tok')} of {count} experts")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise InputError(
            f"{where}: mlp_only_layers, decoder_sparse_step: a model with experts in only some blocks is not covered"
        )


def refuse_code(fields: Mapping[str, Any], where: str) -> None:
    """Refuses a model that brings code.

    Raises:
        InputError: names the field.
    """
    for field in CODE:
        if fields.get(field):
            raise InputError(f"{where}: {field}: the model asks for code of its own, which is never run")


def weight_files(store: Store, names: Mapping[str, int]) -> dict[str, dict[str, TensorInfo]]:
    """The safetensors files that hold the weights, each with its tensors, in order of their names.

    Args:
        store: the model's directory.
        names: its files and their sizes.

    Raises:
        InputError: there are none, one is missing, is a pickle in disguise, or lies about its content.
    """
    if INDEX in names:
        index = read_json(store, INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise InputError(f"{store.uri}: {INDEX}: weight_map is no map of tensors to files")
        files = sorted(set(index.values()))
        for file in files:
            if not SHARD.fullmatch(file):
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
    found: dict[str, dict[str, TensorInfo]] = {}
    for file in files:
        refuse_pickle(store, file)
        try:
            found[file] = read_header(partial(store.read, file), names[file]).tensors
        except InputError as error:
            raise InputError(f"{store.uri}: {file}: {error.message}") from error
    if index is not None:
        places = [(name, file) for file, tensors in found.items() for name in tensors]
        wrong = sorted(set(index.items()) ^ set(places))
        if wrong or len(places) != len(index):
            name = wrong[0][0] if wrong else "in two files"
            raise InputError(f"{store.uri}: {INDEX}: tensor {name!r} is not where the index says")
    return found


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
        found = strict_json(store.get(file))
    except ValueError as error:
        raise InputError(f"{store.uri}: {file}: no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{store.uri}: {file}: no JSON object")
    return found
