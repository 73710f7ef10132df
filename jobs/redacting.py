"""Secrets kept out of whatever is printed, logged or recorded: known values, and what looks like one.

A value can be known (an environment variable whose name says that it is a secret, a webhook's URL) and is then
recognised wherever it turns up. Everything else is recognised by its shape, or by the name that it stands behind.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"
SHORTEST = 8  # characters; hiding shorter values would hide ordinary words
# Names of environment variables, and names of fields: a field called "key" is a place in a store, a variable is not.
VARIABLE = re.compile(r"(TOKEN|SECRET|PASSW(OR)?D|PASSPHRASE|WEBHOOK(_URL)?|KEY|KEY_ID)$", re.IGNORECASE)
FIELD = re.compile(
    r"(token|secret|passw(or)?d|passphrase|authorization|webhook(_url)?|(access|api|private)_?key(_id)?)$",
    re.IGNORECASE,
)
SHAPES = (
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),  # AWS access keys
    (re.compile(r"\b(?:hf_|ghp_|gho_|ghs_|github_pat_|xox[abprs]-|glpat-|sk-)[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), HIDDEN),  # JSON web tokens
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
    # The path of a webhook's URL is its secret; its host may be told.
    (re.compile(r"(https://(?:hooks\.slack(?:-gov)?\.com|(?:[\w-]+\.)*webhook\.office\.com|discord(?:app)?\.com/api/webhooks|"
                r"chat\.googleapis\.com))/[^\s\"'<>]*"), rf"\1/{HIDDEN}"),
    (re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@"), rf"\1{HIDDEN}@"),  # user:password@host
    (re.compile(r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|signature|sig|token|access_token|api_key)=)"
                r"[^&\s\"']+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?)(?:AWS4-HMAC-SHA256[^\"'\n]*|(?:\w+\s+)?[^\s\"',]+)"),
     rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)((?:secret_?access_?key|session_?token|auth_?token|api_?key|client_?secret|password|passwd|secret)"
                r"[\"']?\s*[:=]\s*[\"']?)[^\s\"',}]{4,}"), rf"\1{HIDDEN}"),
)  # fmt: skip
_held_back: set[str] = set()


def hold_back(value: str) -> str:
    """Remembers a secret, so that it is recognised from now on; gives it back."""
    if len(value) >= SHORTEST:
        _held_back.add(value)
    return value


def redact(text: str) -> str:
    """The text without the secrets that are known or recognised."""
    for value in sorted(known(os.environ) | _held_back, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for shape, instead in SHAPES:
        text = shape.sub(instead, text)
    return text


def redact_all(value: Any, name: str = "") -> Any:
    """The same for what lies inside mappings and sequences; text behind a secret's name is hidden whole."""
    if isinstance(value, str):
        return HIDDEN if value and FIELD.search(name) else redact(value)
    if isinstance(value, Mapping):
        return {redact(str(key)): redact_all(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact_all(one, name) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))  # an error, a path, a date: as text, since it may hold anything


def known(environment: Mapping[str, str]) -> set[str]:
    """Values of the variables whose names say that they are secrets."""
    return {value for name, value in environment.items() if len(value) >= SHORTEST and VARIABLE.search(name)}
