"""Model directories: configs, tokenizers and files that would run, lie, or lead elsewhere."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.cases import Case, bomb_module, copied_model, edited_json, pickled_bomb
from hostile.weight_files import resolved

from cluster.paths import cache_directory
from workflows.models.source import load_tokenizer, resolve_source


def directory(name: str, change: Callable[[Path], object], *mentions: str) -> Case:
    """A good model with something changed in its directory."""

    def build(folder: Path) -> Path:
        model = copied_model(folder)
        change(model)
        return model

    return Case(name, build, resolved, mentions)


def config(name: str, *mentions: str, **changes: Any) -> Case:
    """A good model with some fields of its config changed; Ellipsis takes a field away."""
    return directory(name, lambda model: edited_json(model / "config.json", **changes), "config.json", *mentions)


def config_text(name: str, text: str | bytes, *mentions: str) -> Case:
    """A good model with this very config.json."""
    content = text.encode() if isinstance(text, str) else text
    return directory(name, lambda model: (model / "config.json").write_bytes(content), "config.json", *mentions)


def config_line(name: str, line: str, *mentions: str) -> Case:
    """A good model with a line put before its config's fields, as JSON that `json.dumps` would not write."""

    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text("{" + line + "," + path.read_text().lstrip()[1:])

    return directory(name, change, "config.json", *mentions)


def tokenizer(name: str, change: Callable[[Path], object], *mentions: str) -> Case:
    """A good model with something changed in its tokenizer, which is then loaded."""

    def build(folder: Path) -> Path:
        model = copied_model(folder)
        change(model)
        return model

    return Case(name, build, lambda model: load_tokenizer(resolved(model)), mentions)


def address(model: str) -> Case:
    """Something that is no model, as a job might name it."""
    return Case(f"the model is {model[:40]!r}", lambda folder: folder, lambda folder: resolve_source(model, cache_directory()), ("model",))  # fmt: skip


def with_code(model: Path) -> None:
    edited_json(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (model / "evil.py").write_text(bomb_module())


def tokenizer_with_code(model: Path) -> None:
    edited_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    (model / "evil.py").write_text(bomb_module())


def only(*names: str) -> Callable[[Path], None]:
    """Weights as pickles of these names, and no others."""

    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        for name in names:
            (model / name).write_bytes(pickled_bomb())

    return change


def linked(name: str, target: str) -> Callable[[Path], None]:
    """One file becomes a link to a place outside of the model."""

    def change(model: Path) -> None:
        secret = model.parent / "elsewhere" / name
        secret.parent.mkdir()
        (model / name).rename(secret)
        os.symlink(target.format(secret=secret), model / name)

    return change


def large(name: str, size: int) -> Callable[[Path], None]:
    """A file that claims a size but takes no room on disk."""

    def change(model: Path) -> None:
        with (model / name).open("wb") as file:
            file.truncate(size)

    return change


def words(count: int) -> Callable[[Path], None]:
    """More words in the tokenizer than the model has embeddings."""

    def change(model: Path) -> None:
        path = model / "tokenizer.json"
        found = json.loads(path.read_text())
        found["model"]["vocab"] |= {f"word{i}": len(found["model"]["vocab"]) + i for i in range(count)}
        path.write_text(json.dumps(found))

    return change


def replaced(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content.encode() if isinstance(content, str) else content)


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
CASES = [
    # code
    directory("code by auto_map", with_code, "config.json", "auto_map"),
    config("trust_remote_code", "trust_remote_code", trust_remote_code=True),
    config("pipelines of its own", "custom_pipelines", custom_pipelines={"x": {"impl": "evil.Evil"}}),
    config("auto_map as text", "auto_map", auto_map="evil.Evil"),
    config_line("auto_map in escapes", '"auto\\u005fmap": {"AutoModel": "evil.Evil"}', "auto_map"),
    config_line("a field given twice", '"vocab_size": 1, "vocab_size": 2', "twice"),
    directory("only pytorch_model.bin", only("pytorch_model.bin"), "pytorch_model.bin", "run code"),
    directory("only model.pt", only("model.pt"), "model.pt", "run code"),
    directory("only a checkpoint", only("model.ckpt"), "model.ckpt", "run code"),
    directory("only shards of pickles", only("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"), "pytorch_model-00001"),
    directory("no weights at all", only(), "no weights"),
    tokenizer("a tokenizer with code", tokenizer_with_code, "tokenizer_config.json", "auto_map"),
    # the config
    config_text("an empty config", "", "JSON"),
    config_text("a config of NULs", b"\0" * 100, "JSON"),
    config_text("a config that is a list", "[]", "JSON object"),
    config_text("a config that is text", '"llama"', "JSON object"),
    config_text("a config nested deep", '{"a":' * 100_000, "JSON"),
    config_text("a config in latin-1", b'{"a": "\xe9"}', "JSON"),
    config_text("a config cut short", '{"architectures": ["Llama', "JSON"),
    config_text("a config of a number without end", '{"vocab_size": ' + "9" * 100_000 + "}", "JSON"),
    directory("a config of 100 MB", large("config.json", 100 << 20), "config.json", "too large"),
    directory("a config of a TiB", large("config.json", 1 << 40), "config.json", "too large"),
    directory("no config", lambda model: (model / "config.json").unlink(), "config.json is missing"),
    config_line("NaN", '"rms_norm_eps": NaN', "NaN"),
    config_line("infinity", '"rope_theta": -Infinity', "Infinity"),
    config_line("1e999", '"x": 1e999', "1e999"),
    config("an unknown architecture", "architectures", architectures=["EvilForCausalLM"]),
    config("two architectures", "architectures", architectures=["LlamaForCausalLM", "Qwen3ForCausalLM"]),
    config("an architecture that is a map", "architectures", architectures=[{"a": 1}]),
    config("no architecture", "architectures", architectures=...),
    config("another model type", "model_type", model_type="qwen3"),
    config("a model type that is a list", "model_type", model_type=["llama"]),
    config("a model type with a path", "model_type", model_type="../evil"),
    config("no model type", "model_type", model_type=...),
    config("quantised", "quantization_config", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    *(config(f"{field} of {value!r}", field, **{field: value}) for field in SIZES for value in (0, -1, "64", 1.5, None, True, [64], 10**9, 10**30)),
    config("key-value heads that do not divide", "num_key_value_heads", num_key_value_heads=3),
    config("no key-value heads", "num_key_value_heads", num_key_value_heads=0),
    config("heads of no width", "head_dim", head_dim=0),
    config("heads of another width", "head_dim", head_dim=7),
    config("heads of a huge width", "head_dim", head_dim=1 << 40),
    config("an unknown activation", "__import__", hidden_act="__import__('os').system"),
    config("a rotary table of another kind", "'evil'", rope_parameters={"rope_type": "evil", "rope_theta": 1.0}),
    config("a norm of text", "rms_norm_eps", rms_norm_eps="small"),
    config("a field that is Python's own", "config.json", cls="x"),
    config("tied to text", "tie_word_embeddings", tie_word_embeddings="no"),
    # the tokenizer and other files
    directory("no tokenizer", lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    directory("a tokenizer of a TiB", large("tokenizer.json", 1 << 40), "tokenizer.json", "too large"),
    directory("a chat template of 2 GiB", large("chat_template.jinja", 2 << 30), "chat_template.jinja", "too large"),
    tokenizer("an empty tokenizer", replaced("tokenizer.json", ""), "tokenizer"),
    tokenizer("a tokenizer that is a list", replaced("tokenizer.json", "[]"), "tokenizer"),
    tokenizer("a tokenizer nested deep", replaced("tokenizer.json", '{"a":' * 100_000), "tokenizer"),
    tokenizer("a tokenizer that is a pickle", replaced("tokenizer.json", pickled_bomb()), "tokenizer"),
    tokenizer("a tokenizer of an unknown kind", replaced("tokenizer.json", '{"version": "1.0", "model": {"type": "Evil"}}'), "tokenizer"),
    tokenizer("a tokenizer config that is a list", replaced("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    tokenizer("a tokenizer config nested deep", replaced("tokenizer_config.json", '{"a":' * 100_000), "tokenizer_config.json"),
    tokenizer("a tokenizer with more words than embeddings", words(500), "tokenizer", "vocab_size"),
    # links and odd files
    directory("a tokenizer that is a link outside", linked("tokenizer.json", "{secret}"), "tokenizer.json", "link"),
    directory("a config that is a link outside", linked("config.json", "{secret}"), "config.json", "link"),
    directory("weights that are a link outside", linked("model.safetensors", "../elsewhere/model.safetensors"), "model.safetensors", "link"),
    directory("a chat template that is a link to a system file", lambda model: os.symlink("/etc/passwd", model / "chat_template.jinja"), "chat_template.jinja", "link"),
    directory("a config that is a link to itself", lambda model: ((model / "config.json").unlink(), os.symlink("config.json", model / "config.json")), "config.json"),
    directory("weights that are a link to /dev/zero", lambda model: ((model / "model.safetensors").unlink(), os.symlink("/dev/zero", model / "model.safetensors")), "no weights"),
    directory("weights that are a pipe", lambda model: ((model / "model.safetensors").unlink(), os.mkfifo(model / "model.safetensors")), "no weights"),
    directory("a config that is a directory", lambda model: ((model / "config.json").unlink(), (model / "config.json").mkdir()), "config.json"),
    *map(address, (
        "http://example.com/model", "https://huggingface.co/org/model", "file:///etc", "ftp://x/y", "s3://", "s3://bucket/../other",
        "s3://bucket/a//b", "~nobody-of-this-name/model", "../../../../no/such/model", "a" * 300, "/dev/zero", "/etc/passwd", "org/model/more",
        "org/../model", "-rf /", "$(touch x)", "a\0b", "", ".",
    )),
]  # fmt: skip
