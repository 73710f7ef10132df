"""What differs from family to family, in one place: what things are called in files, and what a model is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        architecture: the class that config.json names and transformers builds.
        layers: where its blocks are: the module's path, and what the names of their tensors begin with.
        ffn_inputs: linears of a block that give the channels of its one MLP.
        ffn_output: the linear that reads them.
        followers: how names of linears end that read an input which another one has read before them.
        by_head: how names of linears end whose rows are attention heads.
        classifies: it gives a class for a whole text, not a next token.
        forgotten: tensors of older files that no version of transformers needs any more.
        numbered_after_padding: positions are counted from the padding token's number on, not from 0.
    """

    architecture: str
    layers: str = "model.layers"
    ffn_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_output: str = "mlp.down_proj"
    followers: tuple[str, ...] = ("k_proj", "v_proj", "up_proj", "w3")
    by_head: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    classifies: bool = False
    forgotten: tuple[str, ...] = ()
    numbered_after_padding: bool = False

    def prefix(self, block: int) -> str:
        """What the names of a block's tensors begin with, such as "model.layers.3."."""
        return f"{self.layers}.{block}."


def _encoder(architecture: str, body: str, **special: Any) -> Family:
    """BERT's way of naming things, within a classifier whose encoder is called `body`."""
    return Family(
        architecture,
        layers=f"{body}.encoder.layer",
        ffn_inputs=("intermediate.dense",),
        ffn_output="output.dense",
        followers=("self.key", "self.value"),
        by_head=("self.query", "self.key", "self.value"),
        classifies=True,
        forgotten=(f"{body}.embeddings.position_ids",),
        **special,
    )


FAMILIES = {  # by the model_type by which transformers builds each
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM"),
    "gemma3_text": Family("Gemma3ForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "mixtral": Family("MixtralForCausalLM"),
    "olmoe": Family("OlmoeForCausalLM"),
    "bert": _encoder("BertForSequenceClassification", "bert"),
    "roberta": _encoder("RobertaForSequenceClassification", "roberta", numbered_after_padding=True),
    "xlm-roberta": _encoder("XLMRobertaForSequenceClassification", "roberta", numbered_after_padding=True),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model that was let in (`workflows.models.safety`).

    Args:
        config: its config.json.
    """
    return FAMILIES[config["model_type"]]


def most_tokens(config: Mapping[str, Any]) -> int:
    """Tokens in the longest text that a classifier has positions for."""
    skipped = int(config.get("pad_token_id", 1) or 0) + 1 if family_of(config).numbered_after_padding else 0
    return int(config["max_position_embeddings"]) - skipped
