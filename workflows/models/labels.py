"""The classes of a classifier, as its config.json names them."""

from collections.abc import Mapping
from typing import Any

from cluster.errors import InputError

MOST_LABELS = 4096
LONGEST_NAME = 200


def labels_of(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes, in the order of their numbers; of a config that `check_labels` has let pass."""
    named = config.get("id2label")
    if named is None:
        return [f"LABEL_{number}" for number in range(int(config.get("num_labels", 2)))]
    return [named[str(number)] for number in range(len(named))]


def check_labels(config: Mapping[str, Any], where: str) -> None:
    """Whether a config names at least two classes, each once, and asks for one of them per text.

    Args:
        config: config.json.
        where: names it in errors.

    Raises:
        InputError: names the field.
    """
    kind = config.get("problem_type")
    if kind not in (None, "single_label_classification"):
        raise InputError(f"{where}: problem_type: {kind!r} is not covered; one class for each text is")
    names, count = config.get("id2label"), config.get("num_labels")
    if count is not None and (type(count) is not int or not 2 <= count <= MOST_LABELS):
        raise InputError(f"{where}: num_labels: {count!r} is no whole number from 2 to {MOST_LABELS}")
    if names is None:
        return
    if not isinstance(names, dict) or names.keys() != {str(number) for number in range(len(names))}:
        raise InputError(f'{where}: id2label: it must name the classes "0", "1" and so on, without a gap')
    if not 2 <= len(names) <= MOST_LABELS:
        raise InputError(f"{where}: id2label: {len(names)} classes; from 2 to {MOST_LABELS} are covered")
    if not all(isinstance(one, str) and 0 < len(one) <= LONGEST_NAME and one.isprintable() for one in names.values()):
        raise InputError(f"{where}: id2label: a class's name is a text of 1 to {LONGEST_NAME} characters")
    if len(set(names.values())) != len(names):
        raise InputError(f"{where}: id2label: two classes have one name")
    if count not in (None, len(names)):
        raise InputError(f"{where}: num_labels: {count}, but id2label names {len(names)}")
    numbers = config.get("label2id")
    if numbers is not None and numbers != {name: int(number) for number, name in names.items()}:
        raise InputError(f"{where}: label2id: it is not id2label the other way round")
