"""A model as a run knows it: a source checkpoint, and the blocks rewritten so far."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.storage import Stored
from workflows.models.families import family_of


class ModelState(BaseModel):
    """Names the bytes of a model without holding one of them; crosses every step's border.

    Attributes:
        source: directory or s3:// prefix of the dense Hugging Face checkpoint; it also gives all that is no block
            (embeddings, final norm, head).
        source_digest: digest of the source's weights, config and tokenizer.
        config: the model's config.json, with the edits that the rewritten blocks' shapes ask for.
        store: uri of the run's store, where rewritten blocks lie.
        blocks: one object per block, in order, each a safetensors file with full tensor names; empty for the dense
            model.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    source_digest: str
    config: dict[str, Any]
    store: str
    blocks: tuple[Stored, ...] = ()

    @property
    def block_count(self) -> int:
        """Number of Transformer layers."""
        return int(self.config["num_hidden_layers"])

    def prefix(self, block: int) -> str:
        """What the names of a block's tensors begin with, such as "model.layers.3."."""
        return family_of(self.config).prefix(block)
