"""The base of everything that a person writes. Light: pydantic alone."""

import unicodedata
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LONGEST_TEXT = 4096  # characters; no path, name or address is longer
REORDERING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # shown text is not the real one


class Strict(BaseModel):
    """Unknown keys, NaN, infinity, wrong types and text that hides something are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_seems(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        kind = cls.model_fields[info.field_name].annotation
        flag = bool in (kind, *get_args(kind))  # also one that may be left out
        if isinstance(value, dict) and get_origin(kind) is dict:  # else a model of its own, which looks itself
            given: list[Any] = [*value, *value.values()]
        else:
            given = list(value) if isinstance(value, list | tuple) else [value]
        for one in given:
            if isinstance(one, bool) and not flag:  # pydantic alone would read YAML's `yes` as 1
                raise ValueError("true/false is given where something else is needed")
            if isinstance(one, str):
                plain_text(one)
        return value


def plain_text(text: str) -> str:
    """The text, if it is of a sane length and has no characters that hide or steer something.

    Raises:
        ValueError: it has control characters, parts of characters, or characters that turn the direction of writing.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{len(text)} characters; at most {LONGEST_TEXT} are taken")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") or character in REORDERING:
            raise ValueError(f"holds the character {character!a}, which cannot be seen")
    return text
