"""Whether a checkpoint's tensors are exactly those that its config asks for, told from headers alone."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from cluster.errors import InputError
from workflows.models.checkpoint import DTYPES, as_run
from workflows.models.families import family_of
from workflows.models.safetensors_header import TensorInfo
from workflows.models.whole import empty_model

TIED_HEAD = "lm_head.weight"


def check_fits(config: dict[str, Any], files: Mapping[str, Mapping[str, TensorInfo]], where: str) -> None:
    """Compares names, shapes and types with those of one block, built of the config without any memory.

    Blocks are counted in the files before anything is built of a number in the config.

    Args:
        config: the model's config.json.
        files: each weight file's tensors by their full names.
        where: the model's directory, for errors.

    Raises:
        InputError: no model can be built of the config, or its tensors are others; names the field or the tensor.
    """
    count, family = config["num_hidden_layers"], family_of(config)
    in_block = re.compile(re.escape(family.layers) + r"\.(0|[1-9][0-9]{0,5})\.(.+)")
    matrices = {file: as_run(inside, config) for file, inside in files.items()}
    tensors = {name: (file, info) for file, inside in matrices.items() for name, info in inside.items()}
    blocks = {int(found[1]) for name in tensors if (found := in_block.fullmatch(name))}
    if not tensors or len(blocks) != count or max(blocks) != count - 1:
        missing = next((number for number in range(len(blocks) + 1) if number not in blocks), count)
        raise InputError(
            f"{where}: config.json: num_hidden_layers: {count}, but the weights have {len(blocks)} blocks; "
            + (
                f"{family.layers}.{missing} is missing"
                if missing < count
                else f"there is {family.layers}.{max(blocks)}"
            )
        )
    wanted, tied = _wanted(config, where)
    for name in wanted.keys() - ({TIED_HEAD} if tied else set()):
        block = in_block.fullmatch(name)
        for full in [f"{family.prefix(number)}{block[2]}" for number in range(count)] if block else [name]:
            if full not in tensors:
                raise InputError(f"{where}: tensor {full} is missing; config.json asks for it")
    for name, (file, info) in tensors.items():
        block = in_block.fullmatch(name)
        shape = wanted.get(f"{family.prefix(0)}{block[2]}" if block else name)
        if shape is None:
            raise InputError(f"{where}: {file}: tensor {name!r} is none of the model that config.json describes")
        if shape != info.shape:
            raise InputError(
                f"{where}: {file}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        if info.dtype not in DTYPES:
            raise InputError(f"{where}: {file}: tensor {name} has type {info.dtype}; weights are {', '.join(DTYPES)}")


def _wanted(config: dict[str, Any], where: str) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Shapes of all tensors outside the blocks and of block 0, and whether the head may be left out."""
    types = config.get("layer_types")
    one_block = config | {"num_hidden_layers": 1} | ({"layer_types": types[:1]} if isinstance(types, list) else {})
    try:
        AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = empty_model(one_block, torch.bfloat16)
    except Exception as error:  # transformers promises nothing of what it raises for a bad config
        raise InputError(
            f"{where}: config.json: no model can be built of it: {type(error).__name__}: {error}"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, bool(model.config.tie_word_embeddings)
