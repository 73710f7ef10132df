"""A randomly initialised Llama-3-8B in shape, 16 GB of bf16 shards, written tensor by tensor: the maker stays small.

    python benchmarks/big_checkpoint.py DIRECTORY [--layers 32]

Without a tokenizer: the engine is driven with token numbers. A checkpoint that is whole already is left as it is.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}
SHARD = 4 << 30  # bytes, about
PIECE = 1 << 25  # numbers that are drawn and held at once
SPREAD = 0.02  # standard deviation, as Llama's own initialisation


def write_checkpoint(directory: Path, config: dict = LLAMA_3_8B) -> int:
    """Writes config, shards and index; the index last, so that a directory with one is whole. Returns the bytes."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return int(json.loads(index.read_text())["metadata"]["total_size"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    shapes = shapes_of(config)
    shards = shards_of(shapes)
    weight_map = {}
    draw = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / file, {name: shapes[name] for name in names}, draw)
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {(directory / file).stat().st_size / 1e9:.1f} GB", flush=True)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    return total


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its full name, as transformers names them."""
    from workflows.models.whole import empty_model

    return {name: tuple(one.shape) for name, one in empty_model(config, torch.bfloat16).named_parameters()}


def shards_of(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names by shard, in the model's order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size >= SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * math.prod(shape)
    return shards


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], draw: torch.Generator) -> None:
    """One safetensors file, its numbers drawn piece by piece; norms are ones."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                piece = torch.empty(min(left, PIECE))
                drawn = piece.fill_(1) if len(shape) == 1 else piece.normal_(0, SPREAD, generator=draw)
                file.write(drawn.to(torch.bfloat16).view(torch.int16).numpy())
                left -= len(piece)


def main() -> None:
    """Makes it where it is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=LLAMA_3_8B["num_hidden_layers"])
    asked = parser.parse_args()
    began = time.monotonic()
    total = write_checkpoint(asked.directory, LLAMA_3_8B | {"num_hidden_layers": asked.layers})
    print(f"{total / 1e9:.2f} GB of weights in {asked.directory}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
