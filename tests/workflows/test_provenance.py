"""Provenance and bill of materials hold against the published forms, and say what is true of the files."""

import hashlib
import json
import re
from datetime import UTC, datetime

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from models_for_tests import write_tiny_model
from reports_for_tests import HOSTILE, make_report

from cluster.spec import ClusterSpec
from cluster.storage import Stored, open_store
from workflows.evaluation.cost import Traffic
from workflows.events import ignore
from workflows.formats.huggingface import Formatted
from workflows.models.source import resolve_source
from workflows.provenance import licence
from workflows.recipe import Recipe
from workflows.release import model_digest
from workflows.reports.documents import release_documents
from workflows.settings import Publish, RunSettings
from workflows.steps import Journal

README = b"---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("provenance") / "model", layers=1)
    (directory / "README.md").write_bytes(README)
    return resolve_source(str(directory), directory.parent)


@pytest.fixture
def made(tmp_path, source):
    """The documents of a release, as the run's last step makes them."""
    store = open_store(str(tmp_path / "store"))
    text = tmp_path / "text.txt"
    text.write_text("some text")
    data = {
        role: {"source": str(text), "part": part} for role, part in (("calibration", [0, 0.2]), ("tuning", [0.2, 0.6]))
    }
    recipe = Recipe.model_validate({"model": source.uri, "target": {"pattern": "2:4", "sparsity": 0.5}, "data": data})
    settings = RunSettings(
        run="chat-1",
        name="chat",
        publish=Publish(to=store.uri),
        cluster=ClusterSpec(),
        hardware="cpu-local",
        traffic=Traffic(),
    )
    Journal(store, "chat-1", ignore).step("windows", {}, Stored, lambda work: Stored(key="k", sha256="s", size=1))
    files = {
        "config.json": store.put("runs/chat-1/config", b"{}"),
        "model-outer.safetensors": store.put("runs/o", b"x"),
    }
    report = make_report(stages=2).model_copy(
        update={
            "model_digest": model_digest(files),
            "source_digest": source.digest,
            "created": "2026-11-24T12:00:00+00:00",
        }
    )
    release = Formatted(files=files, digest=model_digest(files), size=report.compressed_size)
    return files, release_documents(store, recipe, settings, source, release, report)


def test_the_statement_holds_against_in_toto_and_slsa(made):
    files, papers = made
    statement = json.loads(papers["PROVENANCE.json"])
    read = json_format.ParseDict(statement, statement_pb2.Statement())
    Statement.copy_from_pb(read).validate()
    predicate = json_format.ParseDict(statement["predicate"], provenance_pb2.Provenance())
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {one.name: one.digest["sha256"] for one in read.subject} == {
        name: stored.sha256 for name, stored in files.items()
    }
    definition, details = predicate.build_definition, predicate.run_details
    for one in (*definition.resolved_dependencies, *details.byproducts):
        ResourceDescriptor.copy_from_pb(one).validate()
        assert re.fullmatch("[0-9a-f]{64}", one.digest["sha256"])
    for uri in (definition.build_type, details.builder.id, *(one.uri for one in definition.resolved_dependencies)):
        assert re.match(r"[a-z][a-z0-9+.-]*:\S+$", uri)
    assert details.metadata.invocation_id == "chat-1"
    assert details.metadata.finished_on.ToDatetime(UTC) == datetime(2026, 11, 24, 12, tzinfo=UTC)
    assert details.metadata.started_on.seconds > 0


def test_what_the_run_read_is_named_by_the_digest_of_its_files(made, source):
    statement = json.loads(made[1]["PROVENANCE.json"])
    definition = statement["predicate"]["buildDefinition"]
    named = {one["name"]: one for one in definition["resolvedDependencies"]}
    root = open_store(source.uri)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert named[f"model/{file}"]["digest"]["sha256"] == hashlib.sha256(root.get(file)).hexdigest()
    assert named["data/calibration"]["digest"]["sha256"] == hashlib.sha256(b"some text").hexdigest()
    assert named["data/evaluation"]["uri"] == "builtin:python-docs"
    assert definition["externalParameters"]["recipe"] == {"model": HOSTILE}
    byproducts = {one["name"]: one["digest"]["sha256"] for one in statement["predicate"]["runDetails"]["byproducts"]}
    assert byproducts == {
        name: hashlib.sha256(made[1][name]).hexdigest() for name in ("REPORT.html", "REPORT.json", "REPORT.parquet")
    }


def test_the_bill_of_materials_holds_against_cyclonedx(made):
    files, papers = made
    text = papers["BOM.cdx.json"].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"SHA-256"', '"SHA-0"')) is not None
    model = json.loads(text)["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": model_digest(files)}]
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert model["pedigree"]["ancestors"][0]["name"] == HOSTILE
    parameters = model["modelCard"]["modelParameters"]
    assert (parameters["architectureFamily"], parameters["task"]) == ("llama", "text-generation")
    references = {one["bom-ref"] for one in json.loads(text)["components"]}
    assert {one["ref"] for one in parameters["datasets"]} <= references
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    told = {(one["type"], one.get("slice")): one for one in metrics}
    assert float(told["perplexity", None]["value"]) == pytest.approx(19.106, abs=0.001)
    assert {"chat", HOSTILE} == {name for kind, name in told if kind == "perplexity"} - {None}
    assert told["perplexity", "chat"]["confidenceInterval"]["lowerBound"] < told["perplexity", "chat"]["value"]


def test_documents_are_no_part_of_the_models_digest(made):
    files, papers = made
    assert model_digest(files) == json.loads(papers["REPORT.json"])["model_digest"]
    assert set(papers) == {"REPORT.json", "REPORT.parquet", "REPORT.html", "PROVENANCE.json", "BOM.cdx.json"}


@pytest.mark.parametrize(
    ("config", "readme", "named"),
    [
        ({}, README, "apache-2.0"),
        ({"license": "mit"}, README, "mit"),
        ({}, b"---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ({}, b"---\nlicense: 'Apache-2.0'\n---\n", "Apache-2.0"),
        ({}, b"# no front matter\nlicense: mit\n", ""),
        ({}, b"---\ntitle: x\n---\nlicense: mit\n", ""),
        ({"license": ["mit"]}, b"", ""),
        ({"license": "<script>"}, b"---\nlicense: &a !!python/object:os.system x\n---\n", ""),
        ({}, b"---\nlicense: " + b"a" * 200 + b"\n---\n", ""),
        ({}, b"\xff\xfe---", ""),
    ],
)
def test_the_licence_is_taken_over_only_as_a_plain_word(config, readme, named):
    assert licence(config, readme) == named
