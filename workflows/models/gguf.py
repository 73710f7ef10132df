"""A GGUF file becomes a stock Hugging Face directory, once: cached under the file's sha256."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from cluster.disk import room_needed
from cluster.errors import InputError

LIST = 9  # GGUF's number for that type of value


def converted(file: Path, cache: Path) -> Path:
    """The directory made of a GGUF file, converting it if that was not done before.

    Weights become bfloat16 safetensors. A conversion that is cut off leaves nothing.

    Args:
        file: the GGUF file.
        cache: where converted models are kept.

    Raises:
        InputError: the file is missing or cannot be converted.
        Unavailable: there is no room for it.
    """
    if not file.is_file():
        raise InputError(f"model: {file} is not there")
    with file.open("rb") as content:
        if content.read(4) != b"GGUF":
            raise InputError(f"model: {file} is no GGUF file")
        content.seek(0)
        target = cache / "gguf" / hashlib.file_digest(content, "sha256").hexdigest()
    if target.is_dir():
        return target
    look_through(file)
    with room_needed(f"{target.parent} (the model cache)"):
        _convert_into(file, target)
    return target


def _convert_into(file: Path, target: Path) -> None:
    """Converts beside the target, then one rename: the target is whole, or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as temporary:
        made = Path(temporary) / "model"
        convert(file, made)
        try:
            made.rename(target)
        except OSError:  # somebody else was faster
            if not target.is_dir():
                raise


def convert(file: Path, directory: Path) -> None:
    """Writes the model and its tokenizer as a stock directory.

    The file is read alone, from a directory that holds nothing else: configs or code beside it do not count, and the
    cache is rightly named by its digest.

    Raises:
        InputError: it cannot be converted.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / "model.gguf").symlink_to(file.absolute())
        only_data = {"gguf_file": "model.gguf", "trust_remote_code": False, "local_files_only": True}
        try:
            model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.bfloat16, **only_data)
            tokenizer = AutoTokenizer.from_pretrained(alone, **only_data)
        except Exception as error:  # neither reader promises anything of what it raises for a bad file
            raise InputError(f"model: {file} cannot be converted: {type(error).__name__}: {error}") from error
    # transformers remembers that the weights came quantised; they are not any more.
    model.hf_quantizer = None
    for owner in (model, model.config):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    model.save_pretrained(directory, max_shard_size="2GB")
    tokenizer.save_pretrained(directory)


def look_through(file: Path) -> None:
    """Reads a GGUF file's structure, before anything is built of it or written.

    Raises:
        InputError: it cannot be read, or its sizes are not those of its tensors.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError("model: reading GGUF files needs a package", "pip install 'karikomi[gguf]'") from error

    class BoundedReader(GGUFReader):
        """The package's reader walks a list by the length that it claims; none has more items than the file bytes."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            length = self.data[orig_offs + 4 : orig_offs + 12].tobytes()
            if raw_type == LIST and int.from_bytes(length, "little") > len(self.data):
                raise ValueError("a list claims to be longer than the file")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        check_structure(BoundedReader(file))
    except Exception as error:  # the reader promises nothing of what it raises for a bad file
        raise InputError(f"model: {file} cannot be converted: {type(error).__name__}: {error}") from error


def check_structure(reader: Any) -> None:
    """Whether the sizes that a model is built by are those of tensors that are really in the file.

    A missing field would be replaced by a default, which for a Llama is a model of 7B parameters.

    Args:
        reader: a `gguf.GGUFReader`.

    Raises:
        ValueError: they are not; names the field.
    """
    fields = {}
    architecture = reader.fields["general.architecture"].contents()
    for name in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        field = reader.fields.get(f"{architecture}.{name}")
        value = None if field is None else field.contents()
        if type(value) is not int or value < 1:
            raise ValueError(f"{architecture}.{name}: {value!r:.40} is no whole number of at least 1")
        fields[name] = value
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    blocks = sum(name.startswith("blk.") and name.endswith(".ffn_down.weight") for name in shapes)
    if blocks != fields["block_count"]:
        raise ValueError(f"{architecture}.block_count: {fields['block_count']}, but the file has {blocks} blocks")
    wanted = [fields["feed_forward_length"], fields["embedding_length"]]
    for name, shape in shapes.items():
        if name.endswith(".ffn_down.weight") and shape != wanted:
            raise ValueError(f"tensor {name!r:.80} has shape {shape}, the fields ask for {wanted}")
