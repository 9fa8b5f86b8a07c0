"""Writes what the pages of docs/ say of the code, out of the code: 'make reference'.

    python docs/_reference [--check]

A page has ``<!-- made by 'make reference': NAME -->`` where a part is made, and ``<!-- end -->``
after it; between the two goes what `BLOCKS` has under that name. ``docs/openapi.json`` is made as
a whole. ``--check`` only says whether all of it is there already.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import commands
import models
import readme
import routes
import tables

from enchtable_vllm.plan.merge_plan import (
    MaskReference,
    MergePlan,
    PlannedTensor,
    VectorLocation,
    VectorReference,
)
from enchtable_vllm.plan.vector_root import CurrentVector
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.swap.request import RollbackRequest, SwapRequest
from enchtable_vllm.vector.format import (
    CachedFactors,
    MatrixFactors,
    ModelReference,
    VectorManifest,
    VectorTensor,
)

DOCS = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(?P<begin><!-- made by 'make reference': (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->\n)",
    re.DOTALL,
)

BLOCKS: dict[str, Callable[[], str]] = {
    "first-screen": readme.first_screen,
    "limits": readme.limits,
    "commands": commands.every_command,
    "loader-keys": lambda: models.table(LoaderConfig, defaults=True),
    "current-keys": lambda: models.table(CurrentVector),
    "manifest-keys": lambda: models.table(VectorManifest),
    "manifest-tensor-keys": lambda: models.table(VectorTensor),
    "model-reference-keys": lambda: models.table(ModelReference),
    "factors-keys": lambda: models.table(CachedFactors),
    "matrix-factors-keys": lambda: models.table(MatrixFactors),
    "plan-keys": lambda: models.table(MergePlan),
    "plan-vector-keys": lambda: models.table(VectorReference),
    "plan-location-keys": lambda: models.table(VectorLocation),
    "plan-masks-keys": lambda: models.table(MaskReference),
    "plan-tensor-keys": lambda: models.table(PlannedTensor),
    "swap-keys": lambda: models.table(SwapRequest, defaults=True),
    "rollback-keys": lambda: models.table(RollbackRequest, defaults=True),
    "routes": routes.table,
    "swap-errors": tables.swap_errors,
    "error-classes": tables.error_classes,
    "metrics": tables.metrics,
    "environment": tables.environment,
}


def made() -> Iterator[tuple[Path, str]]:
    """Each file with parts that are made, and what it should say."""
    missing = set(BLOCKS)
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        names = [match["name"] for match in BLOCK.finditer(text)]
        if unknown := set(names) - BLOCKS.keys():
            raise SystemExit(f"{page.name}: no block is called {sorted(unknown)}")
        missing -= set(names)
        if names:
            yield page, BLOCK.sub(lambda m: m["begin"] + BLOCKS[m["name"]]() + m["end"], text)
    if missing:
        raise SystemExit(f"no page has the blocks {sorted(missing)}")
    yield DOCS / "openapi.json", json.dumps(routes.openapi(), indent=2) + "\n"


def main() -> None:
    """Write the files, or with ``--check`` refuse any that is not what it should be."""
    stale = [(path, text) for path, text in made() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        if stale:
            names = ", ".join(f"docs/{path.name}" for path, _ in stale)
            raise SystemExit(f"{names}: not what the code says: run 'make reference'")
    else:
        for path, text in stale:
            path.write_text(text)


if __name__ == "__main__":
    main()
