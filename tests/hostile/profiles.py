"""Hardware profiles of one's own."""

from hostile.cases import CANARY, Case, file
from hostile.job_files import laughs

from cluster.hardware.profiles import load_profile

GOOD = "name: mine\ncores: 4\nmemory_gib: 1\nprice_per_hour_usd: 1\nprice_source: us\nprice_date: 2026-01\n"


def profile(name: str, text: str | bytes, *mentions: str) -> Case:
    return Case(name, lambda folder: file(folder, "own.yaml", text), lambda path: load_profile(str(path)), ("hardware", "own.yaml", *mentions))  # fmt: skip


def other(name: str, line: str) -> Case:
    """A good profile with one field written otherwise."""
    field = line.split(":")[0]
    kept = [one for one in GOOD.splitlines() if not one.startswith(f"{field}:")]
    return profile(name, "\n".join([*kept, line]) + "\n", field)


def asked(name: str) -> Case:
    return Case(
        f"the profile is {name[:30]!r} of {len(name)} characters",
        lambda folder: folder,
        lambda folder: load_profile(name),
        ("hardware",),
    )


CASES = [
    profile("billion laughs", laughs(9), "aliases"),
    profile("billion laughs within the number of aliases", laughs(5), "own.yaml"),
    profile("os.system by a tag", f"!!python/object/apply:os.system ['touch {CANARY}']", "python/object"),
    profile("deep lists", "[" * 5000, "YAML"),
    profile("a megabyte", "#" * (1 << 20), "larger than"),
    profile("latin-1", GOOD.encode() + b"#\xe9", "cannot be read"),
    profile("a NUL", GOOD + "#\0", "YAML"),
    profile("nothing", ""),
    profile("a list", "- 1"),
    profile("a key twice", GOOD + "cores: 5\n", "'cores'"),
    profile("an unknown field", GOOD + "colour: red\n", "colour"),
    other("no cores", "cores: 0"),
    other("cores of true", "cores: true"),
    other("a fraction of a core", "cores: 1.5"),
    other("memory of nan", "memory_gib: .nan"),
    other("memory of infinity", "memory_gib: .inf"),
    other("no memory", "memory_gib: 0"),
    other("a negative price", "price_per_hour_usd: -1"),
    other("a price of infinity", "price_per_hour_usd: .inf"),
    profile("a price in base 60", GOOD.replace("usd: 1", "usd: 1:30"), "1:30"),
    other("a price without a source", 'price_source: ""'),
    other("a source that steers the terminal", 'price_source: "\\e[2J"'),
    other("a date of a day", "price_date: 2026-01-01"),
    other("a date in other digits", "price_date: ٢٠٢٦-٠١"),
    other("negative GPUs", "gpus: -1"),
    other("a rate of nan", "bf16_tflops: .nan"),
    other("a bandwidth of text", "memory_gb_per_second: fast"),
    *map(asked, ("abacus", "../profiles", "/etc/passwd", "", ".", "..", "a" * 300, "a" * 5000, "a\0", "h100-sxm\n", "~nobody/x.yaml", "/dev/zero.yaml", "x" * 300 + ".yaml", "/proc/self.yml")),
    Case("the profile is a directory", lambda folder: (folder / "own.yaml").mkdir() or folder / "own.yaml", lambda path: load_profile(str(path)), ("hardware", "own.yaml")),
    Case("the profile is a link to /dev/zero", lambda folder: (folder / "own.yaml").symlink_to("/dev/zero") or folder / "own.yaml", lambda path: load_profile(str(path)), ("hardware", "own.yaml", "larger than")),
]  # fmt: skip
