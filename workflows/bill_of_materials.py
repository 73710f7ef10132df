"""A CycloneDX 1.6 bill of materials for a release, with the model's card, as plain JSON.

Form: https://cyclonedx.org/docs/1.6/json/. The release is one component of type machine-learning-model; its files and
the data are components of their own; the dense model is its ancestor.
"""

import uuid
from typing import Any

from cluster.version import VERSION
from workflows.evaluation.measures import measure_of
from workflows.evaluation.quality import Quality
from workflows.formats.huggingface import Formatted
from workflows.provenance import Material, Origin, timestamp
from workflows.reports.report import Report
from workflows.reports.summary import verdict

BOM = "BOM.cdx.json"
SPACE = uuid.UUID("5b0f1f5e-7a4e-4b6e-9d8c-6f1f0c9f2a11")  # of our serial numbers: one for each model and run
MODEL = "model"
SPDX = {  # licences as model cards write them → as SPDX does; others are given by name
    "apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0", "cc-by-nc-4.0": "CC-BY-NC-4.0", "cc0-1.0": "CC0-1.0", "mpl-2.0": "MPL-2.0",
    "gpl-3.0": "GPL-3.0-only", "lgpl-3.0": "LGPL-3.0-only", "agpl-3.0": "AGPL-3.0-only",
}  # fmt: skip
ROLES = {
    "calibration": "Text through which the inputs of every linear were observed.",
    "tuning": "Text on which the model was repaired between stages.",
    "evaluation": "Text on which both models were judged; it shares nothing with the other two.",
}


def bill_of_materials(origin: Origin, report: Report, release: Formatted) -> dict[str, Any]:
    """The bill of materials.

    Args:
        origin: what the run read.
        report: the measured numbers.
        release: the model files.
    """
    files = [
        {
            "type": "file",
            "bom-ref": f"file/{file}",
            "name": file,
            "hashes": _sha256(stored.sha256),
            "properties": [_property("size", stored.size)],
        }
        for file, stored in sorted(release.files.items())
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(SPACE, f"{report.run}/{report.model_digest}").urn,
        "version": 1,
        "metadata": {
            "timestamp": timestamp(origin.ended),
            "tools": {"components": [{"type": "application", "name": "karikomi", "version": VERSION}]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": MODEL,
                "name": origin.name,
                "version": report.model_digest[:12],  # the release's number is known only once it is published
                "hashes": _sha256(report.model_digest),
                **_licences(origin.licence),
                "pedigree": {"ancestors": [_ancestor(origin, report)], "notes": verdict(report)},
                "modelCard": _model_card(origin, report),
                "properties": [
                    _property("digest", "sha256 over the names and sha256s of all model files"),
                    _property("run", report.run),
                    _property("pattern", report.pattern),
                    _property("parameters", report.compressed_size.parameters),
                    _property("zeros", report.compressed_size.zeros),
                ],
            },
        },
        "components": [*files, *(_data(one) for one in origin.data)],
        "dependencies": [
            {"ref": MODEL, "dependsOn": [one["bom-ref"] for one in files]},
        ],
    }


def _ancestor(origin: Origin, report: Report) -> dict[str, Any]:
    """The dense model, with its files."""
    return {
        "type": "machine-learning-model",
        "bom-ref": "source",
        "name": report.model,
        "version": report.source_digest[:12],
        "hashes": _sha256(report.source_digest),
        **_licences(origin.licence),
        "components": [
            {"type": "file", "bom-ref": f"source/{one.name}", "name": one.name, "hashes": _sha256(one.sha256)}
            for one in origin.model
        ],
    }


def _data(material: Material) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": f"data/{material.name}",
        "name": material.name,
        "hashes": _sha256(material.sha256),
        "data": [
            {
                "type": "dataset",
                "name": material.name,
                "description": ROLES[material.name],
                "contents": {"url": material.uri},
            }
        ],
    }


def _model_card(origin: Origin, report: Report) -> dict[str, Any]:
    architectures = origin.config.get("architectures") or ["unknown"]
    measure = report.measure
    further = measure.further(report.compressed)
    judged_by = [measure.name, further[0].label]
    return {
        "modelParameters": {
            "approach": {"type": "supervised" if report.dense.classifies else "self-supervised"},
            "task": "text-classification" if report.dense.classifies else "text-generation",
            "architectureFamily": str(origin.config.get("model_type", "unknown")),
            "modelArchitecture": str(architectures[0]),
            "datasets": [{"ref": f"data/{one.name}"} for one in origin.data],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "class" if report.dense.classifies else "text"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                *_metrics(measure.name, report.compressed),
                *_metrics(f"{measure.name} of the dense model", report.dense),
                *({"type": one.label, "value": f"{one.value:.6g}"} for one in further),
                *(
                    {"type": f"{one.label} of the dense model", "value": f"{one.value:.6g}"}
                    for one in measure.further(report.dense)
                ),
            ]
        },
        "considerations": {
            "technicalLimitations": [
                f"Judged by {' and '.join(judged_by)} on the evaluation data named here, and on nothing else.",
                "Whatever limits the dense model's use limits this one's.",
            ],
            "performanceTradeoffs": [verdict(report), report.published_stage.verdict.sentence],
        },
    }


def _metrics(kind: str, quality: Quality) -> list[dict[str, Any]]:
    """Over all windows, then for each slice, each with its 95 % bootstrap interval."""
    named: list[tuple[str | None, Quality]] = [(None, quality)]
    if len(quality.slices) > 1:
        named += [(name, quality.of_slice(name)) for name in quality.slices]
    metrics = []
    for name, one in named:
        measure = measure_of(one)
        value, interval = measure.value(one), measure.interval(one)
        if value is None or interval is None:
            continue
        metric = {"type": kind, "value": f"{value:.6g}"} | ({"slice": name} if name is not None else {})
        bounds = {"lowerBound": f"{interval[0]:.6g}", "upperBound": f"{interval[1]:.6g}"}
        metrics.append({**metric, "confidenceInterval": bounds})
    return metrics


def _licences(named: str) -> dict[str, Any]:
    if not named:
        return {}
    spdx = SPDX.get(named.lower())
    return {"licenses": [{"license": {"id": spdx} if spdx else {"name": named}}]}


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _property(name: str, value: object) -> dict[str, str]:
    return {"name": f"karikomi:{name}", "value": str(value)}
