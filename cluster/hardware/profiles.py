"""Hardware profiles: what a machine has and costs, with source and date. A profile is a small YAML file."""

from importlib.resources import files
from pathlib import Path

from pydantic import Field, ValidationError

from cluster.errors import InputError
from cluster.strict import Strict
from cluster.yaml_files import load_yaml, read_text


class HardwareProfile(Strict):
    """One machine."""

    name: str = Field(min_length=1)
    cores: int = Field(ge=1, description="CPU threads that a model is timed with.")
    gpus: int = Field(0, ge=0)
    memory_gib: float = Field(gt=0, description="Memory of the GPU, or of the machine without one.")
    bf16_tflops: float | None = Field(None, gt=0, description="Peak matrix rate, dense bf16.")
    memory_gb_per_second: float | None = Field(None, gt=0, description="Peak memory bandwidth.")
    price_per_hour_usd: float = Field(gt=0)
    price_source: str = Field(min_length=1)
    price_date: str = Field(pattern=r"^[0-9]{4}-[0-9]{2}$")


def is_file(name: str) -> bool:
    """Whether a profile is somebody's own file rather than a shipped one."""
    return name.endswith((".yaml", ".yml"))


def load_profile(name: str) -> HardwareProfile:
    """A shipped profile by its name, or one's own by the path of its file.

    Raises:
        InputError: there is none, or it is wrong; lists those there are.
    """
    folder = files("cluster.hardware")
    known = sorted(one.name.removesuffix(".yaml") for one in folder.iterdir() if one.name.endswith(".yaml"))
    own = is_file(name)
    if not own and name not in known:
        raise InputError(
            f"hardware: no profile {name}; there are: {', '.join(known)}", "Or give the path of a YAML file."
        )
    try:
        text = read_text(Path(name), "a hardware profile") if own else (folder / f"{name}.yaml").read_text()
        return HardwareProfile.model_validate(load_yaml(text, name))
    except InputError as error:
        raise InputError(f"hardware: {error.message}", error.hint) from error
    except ValidationError as error:
        raise InputError(f"hardware: {name}: {error}") from error
