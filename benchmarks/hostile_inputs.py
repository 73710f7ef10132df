"""Times every hostile input of tests/hostile in one warm process, and prints the table of benchmarks/hostile.md.

python benchmarks/hostile_inputs.py
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import hostile.test_hostile as tests
from hostile.cases import good_model
from hostile.watch import watching

from cluster.errors import KarikomiError


def main() -> None:
    """One row per kind of input; ends with code 1 when something was not refused."""
    import transformers.models.auto.modeling_auto  # noqa: F401

    good_model()
    print(
        "| kind | inputs | refused | slowest, CPU s | slowest, clock s | most memory, MiB |\n|---|---|---|---|---|---|"
    )
    all_inputs = all_refused = 0
    for kind in tests.KINDS:
        seen, refused = [], 0
        for _, case in (one for one in tests.CASES if one[0] == kind):
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                argument = case.build(Path(folder))
                with watching(Path(folder)) as watched:
                    try:
                        case.read(argument)
                    except KarikomiError:
                        refused += 1
                assert not watched.acts, (case.name, watched.acts)
                seen.append(watched)
                os.chdir("/")
        slowest, waited = max(one.seconds for one in seen), max(one.waited for one in seen)
        grown = max(one.grown for one in seen) >> 20
        print(f"| {kind} | {len(seen)} | {refused} | {slowest:.2f} | {waited:.2f} | {grown} |", flush=True)
        all_inputs, all_refused = all_inputs + len(seen), all_refused + refused
    print(f"| all | {all_inputs} | {all_refused} | | | |")
    sys.exit(all_inputs != all_refused)


if __name__ == "__main__":
    main()
