"""YAML that somebody else wrote: plain data, bounded in size, depth and number of values."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from cluster.errors import InputError

LARGEST_FILE = 256 * 1024  # bytes
MOST_ALIASES = 50  # more only serve to blow a small file up
MOST_EVENTS = 20_000  # about as many values; read in less than a second
DEEPEST = 50
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")


def read_text(path: Path, what: str) -> str:
    """A short text file. Never reads more than its limit, whatever size a device claims to have.

    Args:
        path: the file.
        what: what kind of file it should be, for errors.

    Raises:
        InputError: it is missing, too large, or no UTF-8 text; names the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise InputError(f"{path}: larger than {LARGEST_FILE // 1024} KiB; {what} is short")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:  # also a path that cannot be one
        raise InputError(f"{path}: cannot be read: {error}", f"Give the path of {what}.") from error


def load_yaml(text: str, origin: str) -> Any:
    """Plain data from YAML: no objects, no doubled keys, no numbers that are not what they look like.

    Args:
        text: the YAML.
        origin: where it is from, for errors.

    Raises:
        InputError: it is not such YAML.
    """
    try:
        _bounded(text, origin)
        return yaml.load(text, Loader=PlainLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{origin}: no valid YAML: {error}") from error


def _bounded(text: str, origin: str) -> None:
    """Looks at the text piece by piece, before anything is built of it."""
    aliases = depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        aliases += isinstance(event, AliasEvent)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if aliases > MOST_ALIASES:
            raise InputError(f"{origin}: no valid YAML: more than {MOST_ALIASES} aliases")
        if depth > DEEPEST:
            raise InputError(f"{origin}: no valid YAML: nested deeper than {DEEPEST}")
        if number > MOST_EVENTS:
            raise InputError(f"{origin}: no valid YAML: more than {MOST_EVENTS} values")


class PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses what YAML reads in another way than people do.

    As in YAML 1.2 only true and false are truth values: `on` is a field's name, `no` may be a language.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - so declared by PyYAML
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping after looking for doubled keys, of which YAML would let the last one win."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key must be plain")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def decimal(self, node: yaml.ScalarNode) -> int | float:
        """A number as people read it: YAML 1.1 takes 2:4 for 124 (base 60), 010 for 8 and 1_0 for 10."""
        text = self.construct_scalar(node)
        if node.tag.endswith(":int") and DECIMAL.fullmatch(text):
            return int(text)
        if node.tag.endswith(":float") and not set(text) & {":", "_"}:
            return self.construct_yaml_float(node)
        line = node.start_mark.line + 1
        raise yaml.YAMLError(f'line {line}: {text} would be read as another number; write it plainly, or as "{text}"')


for _kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", PlainLoader.decimal)

PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
