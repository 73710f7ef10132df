"""JSON that somebody else wrote, read so that every reader would understand the same."""

import json
import math
from typing import Any


def strict_json(data: bytes | str) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: it is none, nests too deep, holds a number that is not finite, or gives a name twice.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(one for one in found if names.count(one) > 1)!r} is given twice")
    return found
