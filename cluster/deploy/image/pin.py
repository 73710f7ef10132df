"""Writes constraints.txt: the exact versions of all that the image installs, as they are in this environment.

    .venv/bin/python cluster/deploy/image/pin.py

Run it after the tests passed with new versions.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PYPROJECT = HERE.parents[2] / "pyproject.toml"
HEADER = "# Exact versions of everything in the image; written by pin.py beside this file.\n"
ALSO = "ray[default]"  # the job server, on the head


def image_requirements() -> list[Requirement]:
    """What the image installs by name."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["gguf"], ALSO]
    return [Requirement(line) for line in lines]


def closure(wanted: list[Requirement]) -> dict[str, str]:
    """These packages and all that they need, with the versions that are installed here."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while wanted:
        one = wanted.pop()
        for extra in ("", *sorted(one.extras)):
            if (one.name, extra) in seen:
                continue
            seen.add((one.name, extra))
            try:
                found[canonicalize_name(one.name)] = version(one.name).split("+")[0]  # torch's is 2.13.0+cpu here
            except PackageNotFoundError:
                continue  # one for another platform
            needs = [Requirement(line) for line in requires(one.name) or []]
            wanted += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return found


if __name__ == "__main__":
    pinned = closure(image_requirements())
    lines = "".join(f"{name}=={pinned[name]}\n" for name in sorted(pinned))
    (HERE / "constraints.txt").write_text(HEADER + lines)
