"""The job file: strict, and its errors name the field and say what is allowed."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.errors import InputError
from jobs.fields import field_rows
from jobs.job import Job, parse_job, read_job

NO_JOBS = {"tenants", "schedule"}
EXAMPLES = [
    path
    for path in sorted((Path(__file__).parents[2] / "jobs" / "examples").glob("*.yaml"))
    if path.stem not in NO_JOBS
]
SMALLEST = {
    "name": "chat",
    "model": "some/dir",
    "target": {"pattern": "2:4", "sparsity": 0.5},
    "publish": {"to": "/tmp/x"},
}


def parse(**changes) -> Job:
    return parse_job(yaml.safe_dump(SMALLEST | changes), "job.yaml")


def refused(message, **changes):
    with pytest.raises(InputError, match=message):
        parse(**changes)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_shipped_examples_are_valid(path):
    job = read_job(path)
    assert job.recipe.target.sparsity == job.recipe.stages[-1].sparsity


def test_the_job_in_the_readme_is_valid():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    job = parse_job(readme.split("```yaml\n")[1].split("```")[0], "README.md")
    assert [stage.sparsity for stage in job.recipe.stages] == [0.3, 0.5]


def test_everything_but_four_fields_has_a_default():
    job = parse()
    assert [stage.sparsity for stage in job.recipe.stages] == [0.5]
    assert job.publish.version == "auto"


def test_an_allocation_is_a_policy_or_a_policy_with_its_fields():
    unstructured = {"target": {"pattern": "unstructured", "sparsity": 0.5}}
    short, long = parse(allocation="owl", **unstructured), parse(allocation={"policy": "owl"}, **unstructured)
    assert short.recipe.allocation == long.recipe.allocation
    assert short.recipe.allocation.width == 0.1
    refused("allocation: owl needs pattern unstructured; 2:4 takes the same share of all", allocation="owl")
    refused("policy", allocation="best", **unstructured)
    refused(
        "allocation.windows is 200, but data.calibration.windows only 128",
        allocation={"policy": "measured", "windows": 200}, **unstructured,
    )  # fmt: skip


def test_recovery_needs_the_states_of_pruned_blocks():
    refused("recovery repairs a block for the inputs it will have", recovery={"steps": 2}, propagate="dense")


def test_the_same_job_is_the_same_run_wherever_it_runs():
    assert parse().run == parse(cluster={"workers": 8}).run
    assert parse().run != parse(seed=1).run
    assert parse().run != parse(tenant="other").run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, r"job\.yaml: colour: unknown field; allowed here: model, data"),
        ({"solver": {"title": "wanda"}}, r"solver\.title: unknown field; allowed here: name, damping, ratios, refit, swaps, rows"),
        ({"stages": [{"sparsity": 0.5, "tune": {"step": 1}}]}, r"stages\.0\.tune\.step: unknown field; allowed here: steps"),
        ({"solver": {"name": "magic"}}, r"solver\.name: .*'magnitude', 'wanda', 'sparsegpt' or 'admm'.*given: 'magic'"),
        ({"target": {"pattern": "2:4", "sparsity": float("nan")}}, r"target\.sparsity: .*finite"),
        ({"target": {"pattern": "2:4", "sparsity": float("inf")}}, r"target\.sparsity"),
        ({"target": {"pattern": "2:4", "sparsity": 1.0}}, r"target\.sparsity: .*less than 1"),
        ({"target": {"pattern": "4:2", "sparsity": 0.5}}, r"target\.pattern: .*allowed: .unstructured., .ffn., .N:M. with"),
        ({"target": {"pattern": "16x8", "sparsity": 0.5}}, r"target\.pattern: .*allowed: .*, or .BxB. with B from 2 to 128"),
        ({"target": {"pattern": "129x129", "sparsity": 0.5}}, r"target\.pattern: .*or .BxB. with B from 2 to 128"),
        ({"target": {"pattern": "48x48", "sparsity": 0.5}}, r"solver\.rows 512 is no multiple of 48, which pattern 48x48 needs; write 480"),
        ({"target": {"pattern": "16x16", "sparsity": 0.5}, "solver": {"swaps": 1}}, r"solver\.swaps .* pattern 16x16 none goes alone; write 0"),
        ({"target": {"pattern": "2:4", "sparsity": 0.6}}, r"target: target\.sparsity 0\.6 cannot be met by pattern 2:4; write 0\.5"),
        ({"target": {"pattern": "ffn", "sparsity": "much"}}, r"target\.sparsity: .*given: 'much'"),
        ({"stages": [{"sparsity": 0.3}]}, r"last one's sparsity 0\.3 must be target\.sparsity 0\.5"),
        ({"stages": [{"sparsity": 0.5}, {"sparsity": 0.3}]}, r"must rise"),
        ({"stages": [{"sparsity": True}]}, r"stages\.0\.sparsity: true/false is given where something else is needed"),
        ({"format": "compact", "target": {"pattern": "ffn", "sparsity": 0.5}}, r"packs zeros, but pattern ffn leaves none"),
        ({"solver": {"swaps": 2}, "target": {"pattern": "ffn", "sparsity": 0.5}}, r"solver\.swaps .*pattern ffn none goes alone"),
        ({"name": "../evil"}, r"name: "),
        ({"publish": {}}, r"publish\.to: Field required"),
        ({"publish": {"to": "x", "version": "a/b"}}, r"publish\.version"),
        ({"cluster": {"workers": 0}}, r"cluster\.workers: .*greater than or equal to 1"),
        ({"cluster": {"workers": 1.5}}, r"cluster\.workers"),
        ({"data": {"calibration": {"source": "a.txt", "part": [0.5, 0.5]}}}, r"holds nothing"),
        ({"data": {"calibration": {"source": "a.txt", "windows": 2}}}, r"data\.shards is 4"),
        (
            {"data": {"calibration": {"source": "a.txt"}, "evaluation": {"source": "a.txt"}}},
            r"data\.calibration and data\.evaluation both read a\.txt",
        ),
    ],
)  # fmt: skip
def test_bad_fields_are_named(changes, message):
    refused(message, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "a job is a mapping"),
        ("", "a job is a mapping"),
        ("a: [", "no valid YAML"),
        ("name: x\nname: y", "key 'name' is given twice"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
        ("a: &a [1]\nb: [" + ", ".join(["*a"] * 60) + "]", "more than 50 aliases"),
        ("? [a]\n: b", "no valid YAML"),
        ("a: " + "[" * 3000, "no valid YAML"),
        ("a: \x00", "no valid YAML"),
    ],
)
def test_bad_yaml_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_job(text, "job.yaml")


def test_a_huge_or_missing_file_is_refused(tmp_path):
    (tmp_path / "huge.yaml").write_text("#" * 300_000)
    with pytest.raises(InputError, match="larger than 256 KiB"):
        read_job(tmp_path / "huge.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_job(tmp_path / "none.yaml")


def test_every_field_says_what_it_means():
    rows = field_rows(Job)
    assert len(rows) > 40
    assert [path for path, _, meaning in rows if not meaning] == []


@pytest.mark.parametrize("module", ["jobs.cli", "jobs.job", "jobs.fields", "jobs.signals", "jobs.run_due"])
def test_help_and_checks_need_neither_torch_nor_ray(module):
    program = (
        f"import sys, {module}; print([one for one in ('torch', 'ray', 'transformers', 'boto3') if one in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_calibration_has_a_size_even_if_none_is_given(tmp_path):
    job = parse_job(
        """
        name: a
        model: b
        target: {pattern: "2:4", sparsity: 0.5}
        data: {calibration: {source: large.parquet}, evaluation: {source: eval.parquet}}
        publish: {to: out}
        """,
        "job.yaml",
    )
    assert job.data.calibration.windows == 128
    assert job.data.evaluation.windows is None
