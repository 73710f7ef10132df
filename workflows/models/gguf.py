"""A GGUF file becomes a stock Hugging Face directory, once: cached under the file's sha256."""

import hashlib
import tempfile
from pathlib import Path

from cluster.disk import room_needed
from cluster.errors import InputError


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
    cache is rightly named by its digest. Its structure is looked through before anything is built of it.

    Raises:
        InputError: it cannot be converted.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError("model: reading GGUF files needs a package", "pip install 'karikomi[gguf]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / "model.gguf").symlink_to(file.absolute())
        only_data = {"gguf_file": "model.gguf", "trust_remote_code": False, "local_files_only": True}
        try:
            GGUFReader(file)
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
