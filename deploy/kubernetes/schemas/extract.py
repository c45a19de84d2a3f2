#!/usr/bin/env python3
"""Extracts the parts of the Kubernetes API schema and of the JobSet CRD that the tests need into schemas.json.

Both come through the Go module proxy, in the versions named below; Go is needed for this script only, not for the tests.

    deploy/kubernetes/schemas/extract.py
"""

import json
import pathlib
import subprocess

KUBERNETES = "k8s.io/kubernetes@v1.35.4"
JOBSET = "sigs.k8s.io/jobset@v0.12.0"
KINDS = {
    "v1/ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "v1/Namespace": "io.k8s.api.core.v1.Namespace",
    "v1/PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "v1/Secret": "io.k8s.api.core.v1.Secret",
    "v1/Service": "io.k8s.api.core.v1.Service",
    "v1/ServiceAccount": "io.k8s.api.core.v1.ServiceAccount",
    "batch/v1/Job": "io.k8s.api.batch.v1.Job",
    "networking.k8s.io/v1/NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "rbac.authorization.k8s.io/v1/Role": "io.k8s.api.rbac.v1.Role",
    "rbac.authorization.k8s.io/v1/RoleBinding": "io.k8s.api.rbac.v1.RoleBinding",
    "jobset.x-k8s.io/v1alpha2/JobSet": "jobset",
}
KEPT = ("type", "format", "required", "enum", "pattern", "minimum", "maximum", "maxLength", "minLength", "maxItems", "$ref")


def module(name: str) -> pathlib.Path:
    found = subprocess.run(["go", "mod", "download", "-json", name], check=True, capture_output=True, cwd="/")
    return pathlib.Path(json.loads(found.stdout)["Dir"])


def trimmed(schema: dict) -> dict:
    """Structure and constraints of a schema without its descriptions."""
    out = {key: schema[key] for key in KEPT if key in schema}
    if "$ref" in out:
        out["$ref"] = out["$ref"].removeprefix("#/definitions/")
    if "properties" in schema:
        out["properties"] = {name: trimmed(inner) for name, inner in sorted(schema["properties"].items())}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            out[key] = trimmed(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        out["format"] = "int-or-string"
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        out["open"] = True
    return out


def references(schema) -> set:
    if isinstance(schema, dict):
        own = {schema["$ref"]} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*(references(inner) for inner in schema.values()))
    return set()


def jobset_schema() -> dict:
    import yaml

    crd = yaml.safe_load((module(JOBSET) / "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml").read_text())
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1alpha2")
    schema = trimmed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"$ref": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    del schema["properties"]["status"]
    # The CRD repeats these API types in full; refer to them instead.
    spec = schema["properties"]["spec"]["properties"]
    spec["replicatedJobs"]["items"]["properties"]["template"] = {"$ref": "io.k8s.api.batch.v1.JobTemplateSpec"}
    spec["volumeClaimPolicies"]["items"]["properties"]["templates"] = {
        "type": "array",
        "items": {"$ref": "io.k8s.api.core.v1.PersistentVolumeClaim"},
    }
    return schema


def main() -> None:
    swagger = json.loads((module(KUBERNETES) / "api/openapi-spec/swagger.json").read_text())
    definitions = {"jobset": jobset_schema()}
    wanted = set(KINDS.values()) | references(definitions["jobset"])
    while missing := wanted - definitions.keys():
        for name in missing:
            definitions[name] = trimmed(swagger["definitions"][name])
            # Manifests never contain `status`, which the server writes.
            if name in KINDS.values():
                definitions[name]["properties"].pop("status", None)
            wanted |= references(definitions[name])
    out = {"from": [KUBERNETES, JOBSET], "kinds": KINDS, "definitions": dict(sorted(definitions.items()))}
    path = pathlib.Path(__file__).parent / "schemas.json"
    lines = [f"{json.dumps(name)}: {json.dumps(schema)}" for name, schema in out["definitions"].items()]
    head = json.dumps({"from": out["from"], "kinds": out["kinds"]})[:-1]
    path.write_text(head + ', "definitions": {\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
