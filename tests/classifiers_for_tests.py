"""Tiny encoder classifiers and a made-up task that they really learn, so that accuracy means something."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

ENCODERS = ("bert", "roberta", "xlm-roberta")
LABELS = {0: "gloomy", 1: "sunny"}
BRIGHT = [f"bright{i}" for i in range(8)]
DARK = [f"dark{i}" for i in range(8)]
PLAIN = [f"plain{i}" for i in range(24)]


def write_tiny_classifier(
    directory: Path | str,
    family: str = "bert",
    layers: int = 2,
    hidden: int = 32,
    ffn: int = 64,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Writes a stock Hugging Face directory: config, safetensors, tokenizer; nothing is learnt yet."""
    directory = Path(directory)
    tokenizer = word_tokenizer()
    config = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        type_vocab_size=2,
        pad_token_id=tokenizer.pad_token_id,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
        **fields,
    )
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_trained_classifier(directory: Path | str, steps: int = 300, **shape: Any) -> Path:
    """A tiny classifier that has learnt the task: nearly always right on sentences that it has not seen."""
    directory = write_tiny_classifier(directory, **shape)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).train()
    tokenizer = word_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = sentences(steps * 32, seed=1)
    for step in range(steps):
        batch = rows[32 * step : 32 * (step + 1)]
        inputs = tokenizer([text for text, *_ in batch], padding=True, return_tensors="pt")
        model(**inputs, labels=torch.tensor([label for _, label, _ in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


def sentences(count: int, seed: int) -> list[tuple[str, int, str]]:
    """(text, class, slice): more bright words than dark ones make a sentence sunny; slices are by length."""
    chance = random.Random(seed)
    rows: list[tuple[str, int, str]] = []
    while len(rows) < count:
        words = chance.choices(BRIGHT + DARK + PLAIN, k=chance.randint(3, 14))
        balance = sum((word in BRIGHT) - (word in DARK) for word in words)
        if balance:
            rows.append((" ".join(words), int(balance > 0), "short" if len(words) < 9 else "long"))
    return rows


def write_sentences(path: Path, count: int = 400, seed: int = 2) -> Path:
    """A TSV of sentences with their labels and slices."""
    lines = ["sentence\tlabel\tkind", *("\t".join(map(str, row)) for row in sentences(count, seed))]
    path.write_text("\n".join(lines) + "\n")
    return path


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and a first and a last one around every sentence, as BERT's has."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: number for number, word in enumerate(special + BRIGHT + DARK + PLAIN)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    )  # fmt: skip
