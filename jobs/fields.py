"""The job file's fields as a table: made from the models, so it is never out of date."""

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.table import Table

from jobs.job import Job


def field_table() -> Table:
    """Every field by its path, with default and meaning."""
    table = Table("field", "default", "meaning", box=None, pad_edge=False)
    for path, default, meaning in field_rows(Job):
        table.add_row(path, default, meaning)
    return table


def field_rows(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """(path, default, meaning) of each field, nested ones after their parent."""
    rows = []
    for name, field in model.model_fields.items():
        nested = nested_model(field.annotation)
        default = "required" if field.default is PydanticUndefined else "" if nested else str(field.default)
        rows.append((prefix + name, default, field.description or ""))
        if nested:
            many = "[]" if "tuple" in str(field.annotation) else ""
            rows += field_rows(nested, f"{prefix}{name}{many}.")
    return rows


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `Tune | None` or `tuple[Stage, ...]`."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)
