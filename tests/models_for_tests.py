"""Tiny random models, real in every other way: real architectures, a real tokenizer, stock checkpoints."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
MIXTURES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")
SLIDING = {"sliding_window": 16}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
SPECIAL = {
    "llama": {},
    "mistral": SLIDING,
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, **EXPERTS},
    "qwen3_moe": {"moe_intermediate_size": 32, "head_dim": 16, **EXPERTS},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": EXPERTS,
}


def write_tiny_model(
    directory: Path | str,
    family: str = "llama",
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 128,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    save_original_format: bool = True,
) -> Path:
    """Writes a stock Hugging Face directory: config, safetensors, tokenizer; experts one by one, or fused."""
    directory = Path(directory)
    tokenizer = byte_tokenizer()
    special = dict(SPECIAL[family])
    if family == "gemma3":
        special["layer_types"] = [("full" if i % 2 else "sliding") + "_attention" for i in range(layers)]
    config = AutoConfig.for_model(
        "gemma3_text" if family == "gemma3" else family,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=family.startswith("gemma"),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **special,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(
        directory, max_shard_size=max_shard_size, save_original_format=save_original_format
    )
    tokenizer.save_pretrained(directory)
    return directory


def write_trained_model(directory: Path | str, steps: int = 300, **shape: Any) -> Path:
    """A tiny model that has learnt a little English from Python's documentation, so that pruning can hurt it."""
    from pydoc_data.topics import topics

    directory = write_tiny_model(directory, dtype="float32", **shape)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = byte_tokenizer()("".join(topics[name] for name in sorted(topics))[:200_000])["input_ids"]
    windows = torch.tensor(text[: len(text) // 64 * 64]).reshape(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (16,), generator=random)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and <pad>, <bos>, <eos>: needs no training and loses nothing."""
    special = ["<pad>", "<bos>", "<eos>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=2048
    )
