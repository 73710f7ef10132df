"""What a job asks of a Ray cluster. Light: no ray here."""

from typing import Annotated

from pydantic import Field

from cluster.strict import Strict


class ClusterSpec(Strict):
    """Where and how wide the work runs. Nothing in here changes the result's bytes."""

    address: str = Field(
        "embedded",
        description="embedded: a Ray is started for this run alone; an address of Ray; or, to submit to, http://HOST:8265.",
    )
    workers: Annotated[int, Field(ge=1, le=1024)] = Field(2, description="Shard workers; each holds its shards only.")
    gpus_per_worker: Annotated[float, Field(ge=0, le=8)] = Field(0, description="GPUs, or a share of one, per worker.")
    wait_seconds: Annotated[float, Field(gt=0)] = Field(300, description="How long to wait for free machines.")
    block_seconds: Annotated[float, Field(gt=0)] = Field(
        7200,
        description="A block, part of an evaluation or measurement that takes longer counts as stuck; its workers go.",
    )
    spill_above_gib: Annotated[float, Field(ge=0)] = Field(
        4.0, description="Activations that a worker keeps in memory for a gradient pass; more go to its disk (TMPDIR)."
    )
    grace_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(
        300, description="How long a cancelled driver may take to finish the block at hand, before it is killed."
    )
