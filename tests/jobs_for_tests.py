"""The smallest job that goes the whole way: no tuning, gates that let everything pass."""

from typing import Any

PART = {"source": "builtin:python-docs", "length": 32}


def tiny_job(model: object, to: object, **changes: object) -> dict[str, Any]:
    """A job's fields; `changes` replace or add some."""
    fields = {
        "name": "tiny",
        "model": str(model),
        "data": {
            "calibration": PART | {"part": [0, 0.2], "windows": 4},
            "evaluation": PART | {"part": [0.8, 1], "windows": 4},
        },
        "target": {"pattern": "2:4", "sparsity": 0.5},
        "gates": {"perplexity_increase": 9.0, "worst_slice_increase": 9.0},
        "traffic": {"prompt_tokens": 16, "output_tokens": 4},
        "publish": {"to": str(to)},
    }
    return fields | changes
