"""Tenants files: YAML that attacks its reader, prefixes that lead out, and keys that must never be shown."""

from pathlib import Path
from typing import Any

import yaml
from hostile.cases import CANARY, Case, file
from hostile.job_files import laughs

from cluster.errors import InputError
from jobs.tenants import load_tenants

TENANT: dict[str, Any] = {"members": ["ann"], "prefixes": ["s3://models/retail"]}
TEXT = yaml.safe_dump({"tenants": {"retail": TENANT}})
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
KEY_ID = "AKIAIOSFODNN7EXAMPLE"


def refused(path: Path) -> object:
    """Reads the file; a refusal that shows a key is another error than the one that is waited for."""
    try:
        return load_tenants(str(path))
    except InputError as error:
        if SECRET in str(error) or KEY_ID in str(error):
            raise RuntimeError("a key is shown") from error
        raise


def raw(name: str, content: bytes | str, *mentions: str) -> Case:
    """A tenants file of exactly this content."""
    return Case(name, lambda folder: file(folder, "tenants.yaml", content), refused, ("tenants.yaml", *mentions))


def changed(name: str, changes: dict[str, Any], *mentions: str) -> Case:
    """A good file whose tenant has some other fields; Ellipsis takes one away."""
    tenant = {key: value for key, value in (TENANT | changes).items() if value is not ...}
    return raw(name, yaml.safe_dump({"tenants": {"retail": tenant}}, allow_unicode=True), "retail", *mentions)


def line(name: str, text: str, *mentions: str) -> Case:
    """A good file with one line more in the tenant: what YAML makes of a value is the point."""
    return raw(name, f"{TEXT}    {text}\n", *mentions)


def called(what: str, name: Any) -> Case:
    return raw(f"a tenant named {what}", yaml.safe_dump({"tenants": {name: TENANT}}), "tenants")


def special(path: str) -> Case:
    return Case(
        f"the tenants file is {path[:30]!r}", lambda folder: Path(path), refused, (path[:10].replace("\0", "\\x00"),)
    )


def link_to_zero(folder: Path) -> Path:
    (folder / "tenants.yaml").symlink_to("/dev/zero")
    return folder / "tenants.yaml"


CASES = [
    # YAML itself
    raw("billion laughs", laughs(9), "aliases"),
    raw("billion laughs within the number of aliases", laughs(5)),
    raw("a tenant that is its own member", "tenants: {retail: &a {members: [*a], prefixes: [/x]}}", "retail"),
    raw("deep flow lists", "tenants: " + "[" * 5000, "YAML"),
    raw("very many tenants", "tenants:\n" + "".join(f"  t{i}: {{}}\n" for i in range(19_000)), "YAML"),
    raw("very many mistakes", "tenants:\n" + "".join(f"  t{i}: 1\n" for i in range(5_000)), "tenants"),
    raw("a megabyte", TEXT + "#" * (1 << 20), "larger than"),
    raw("os.system by a tag", f"tenants: !!python/object/apply:os.system ['touch {CANARY}']", "constructor for the tag"),
    raw("a file by a tag", "tenants: !include /etc/passwd", "constructor for the tag"),
    raw("a tenant twice", TEXT + "  retail: {members: ['*'], prefixes: [/]}\n", "given twice"),
    raw("two documents", TEXT + "---\n" + TEXT, "YAML"),
    raw("latin-1", TEXT.encode() + b"# caf\xe9", "cannot be read"),
    raw("utf-16", TEXT.encode("utf-16"), "cannot be read"),
    raw("a NUL", TEXT + "#\0", "YAML"),
    raw("nothing", b"", "mapping"),
    raw("a list", "- retail", "mapping"),
    raw("no tenants", "tenants: {}", "tenants"),
    raw("tenants as a list", "tenants: [retail]", "tenants"),
    raw("tenants of nothing", "tenants: ~", "tenants"),
    raw("a tenant of nothing", "tenants: {retail: ~}", "retail"),
    raw("another field at the top", TEXT + "admins: [ann]\n", "admins"),
    # keys, of which not a letter may be shown
    changed("a literal key", {"credentials": {"aws_secret_access_key": SECRET}}, "credentials", "must not be in this file"),
    changed("a literal token", {"credentials": {"session_token": SECRET}}, "credentials", "must not be in this file"),
    changed("a key's id as profile", {"credentials": {"profile": KEY_ID}}, "credentials", "must not be in this file"),
    changed("a key's id as environment", {"credentials": {"environment": KEY_ID}}, "credentials", "must not be in this file"),
    changed("a secret as role", {"credentials": {"role": SECRET}}, "credentials.role"),
    changed("credentials as text", {"credentials": SECRET}, "credentials"),
    changed("a secret beside the fields", {"secret": SECRET}, "secret"),
    line("a secret in broken YAML", f"secret: [{SECRET}", "YAML"),
    line("a secret in a number's place", f"gpus: {SECRET}", "gpus"),
    line("a secret twice", f"secret: {SECRET}\n    secret: {SECRET}", "YAML"),
    line("an alias of a secret", f"secret: *{SECRET}", "YAML"),
    line("a tag of a secret", f"secret: !{SECRET} a", "YAML"),
    changed("two ways to keys", {"credentials": {"environment": "RETAIL", "profile": "retail"}}, "credentials", "exactly one"),
    changed("no way to keys", {"credentials": {}}, "credentials", "exactly one"),
    changed("an environment that leads out", {"credentials": {"environment": "A=1;B"}}, "credentials.environment"),
    changed("an environment with a last newline", {"credentials": {"environment": "RETAIL\n"}}, "credentials.environment"),
    changed("a profile with a newline", {"credentials": {"profile": "a\n[default]"}}, "credentials.profile"),
    changed("a profile with a last newline", {"credentials": {"profile": "retail\n"}}, "credentials.profile"),
    changed("a role with a last newline", {"credentials": {"role": "arn:aws:iam::123456789012:role/a\n"}}, "credentials.role"),
    # prefixes
    *(
        changed(f"a prefix that {what}", {"prefixes": [prefix]}, "prefixes")
        for what, prefix in {
            "climbs": "s3://models/retail/../research", "climbs at its end": "s3://models/retail/..", "stands": "s3://models/./retail",
            "has an empty part": "s3://models//retail", "names no bucket": "s3://", "names no bucket but a key": "s3:///retail",
            "is nothing": "", "is relative": "models/retail", "is the home of somebody": "~root", "is a web address": "https://models/retail",
            "climbs in a directory": "/srv/retail/../research", "climbs in percent signs": "file:///srv/%2e%2e/etc",
            "has a backslash": "s3://models\\retail", "has a NUL": "/srv/a\0b", "has a newline": "s3://models/retail\n", "never ends": "/a" * 5000,
            "is another machine's": "file://host/srv", "turns its writing": "/srv/\u202eliater", "is in capitals": "S3://models/retail",
            "is a loop of percent signs": "file:///srv/%00", "is all buckets of some name": "s3://*/retail", "holds a question mark": "s3://models/re?ail",
        }.items()
    ),
    changed("no prefixes", {"prefixes": []}, "prefixes"),
    changed("prefixes that are left out", {"prefixes": ...}, "prefixes"),
    changed("prefixes as text", {"prefixes": "s3://models/retail"}, "prefixes"),
    changed("a prefix of a number", {"prefixes": [5]}, "prefixes"),
    changed("a store outside", {"store": "s3://models/research"}, "store", "outside"),
    changed("a store that begins like its prefix", {"store": "s3://models/retail-evil"}, "store", "outside"),
    changed("a store that climbs out", {"store": "s3://models/retail/../research"}, "store"),
    changed("a store of nothing", {"store": ""}, "store"),
    # numbers
    *(
        line(f"{field} of {what}", f"{field}: {value}", field)
        for field in ("gpus", "cpus", "monthly_budget_usd")
        for what, value in {"nan": ".nan", "infinity": ".inf", "less than nothing": "-1", "true": "true", "a list": "[1]", "text": "much"}.items()
    ),
    line("a budget in base 60", "monthly_budget_usd: 1:30", "1:30"),
    line("a budget too large for any number", "monthly_budget_usd: " + "9" * 400, "monthly_budget_usd"),
    line("a priority beyond all", "priority: 1001", "priority"),
    line("a priority of a fraction", "priority: 0.5", "priority"),
    line("a gate of nan", "gates: {perplexity_increase: .nan}", "gates.perplexity_increase"),
    line("a gate that nobody has", "gates: {speed: 2}", "gates.speed"),
    line("a number that loosens", "gates: {may_loosen: 7}", "may_loosen"),
    line("a price of nothing", "prices: {h100-sxm: 0}", "prices"),
    line("a price of nan", "prices: {h100-sxm: .nan}", "prices"),
    line("a price of infinity", "prices: {h100-sxm: .inf}", "prices"),
    line("a price of true", "prices: {h100-sxm: true}", "prices"),
    line("a price of an unknown profile", "prices: {abacus: 1}", "prices", "abacus"),
    line("a price of a file that is none", "prices: {/etc/passwd: 1}", "prices"),
    line("a price of a file without end", "prices: {/dev/zero.yaml: 1}", "prices"),
    line("a price of what leads out", "prices: {../../etc/passwd: 1}", "prices"),
    # names and members
    *(
        called(what, name)
        for what, name in {
            "dots": "..", "a way out": "../b", "nothing": "", "blanks": "a b", "an option": "--help", "in capitals": "Retail", "a newline": "a\n",
            "by look-alikes": "rеtail", "a number": 1, "true": True, "null": None, "length": "a" * 64, "percent signs": "%2e", "an escape": "\x1b[2J",
        }.items()
    ),
    changed("no members", {"members": []}, "members"),
    changed("members as text", {"members": "*"}, "members"),
    changed("a member of a map", {"members": [{"ann": 1}]}, "members"),
    changed("a member with an escape sequence", {"members": ["a\x1b[2Jb"]}, "members"),
    changed("a member of nothing", {"members": [""]}, "members"),
    changed("a member without end", {"members": ["a" * 5000]}, "members"),
    changed("a business unit without end", {"business_unit": "a" * 201}, "business_unit"),
    changed("a business unit that steers the terminal", {"business_unit": "\x1b]0;x\x07"}, "business_unit"),
    changed("an unknown field", {"admin": True}, "admin", "unknown field"),
    special("/dev/zero"),
    special("/dev/urandom"),
    special("/proc/self/mem"),
    special("/"),
    special("/no/such/tenants.yaml"),
    special("/tmp/" + "a" * 5000),
    special("a\0b"),
    special("~nobody-there/tenants.yaml"),
    Case("the tenants file is a link to /dev/zero", link_to_zero, refused, ("tenants.yaml", "larger than")),
]  # fmt: skip
