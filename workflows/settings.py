"""All that a run is told beside its recipe; none of it changes the model's bytes."""

from pydantic import BaseModel, ConfigDict, Field

from cluster.spec import ClusterSpec
from cluster.strict import Strict
from workflows.evaluation.cost import Traffic
from workflows.recipe import Name


class Publish(Strict):
    """Where a release goes."""

    to: str = Field(min_length=1, description="s3://bucket/prefix or a directory; also keeps the run's state.")
    version: str = Field(
        "auto",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="auto takes the next free number; a name of your own must not be taken by another model.",
    )
    sign_with: str | None = Field(
        None,
        min_length=1,
        description="PEM file of a private elliptic-curve key, on the driver's machine; its content is kept nowhere.",
    )


class RunSettings(BaseModel):
    """Who and where: a run's name, destination, machines and the traffic its costs are counted for."""

    model_config = ConfigDict(frozen=True)

    run: str
    name: Name
    publish: Publish
    cluster: ClusterSpec
    hardware: str
    traffic: Traffic
