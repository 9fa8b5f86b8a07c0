"""Runs the tests of serving on several versions of vLLM, really installed, and writes the table.

``make test-matrix [VERSIONS="0.28.0 0.24.0"] [KEEP=1]``. Each version gets an environment of its
own in ``.matrix/`` (about two minutes and three gigabytes; taken away afterwards), the tests of
loading and of swapping run in it as they are, and what came of it goes into
``enchtable_vllm/serving/tested_versions.json`` and ``docs/versions.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from packaging.version import Version

from enchtable_vllm.serving.versions import (
    TESTED_FILE,
    TestedVersion,
    lower_bound,
    swapping_bound,
    tested_versions,
)

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENTS = ROOT / ".matrix"
TABLE = ROOT / "docs" / "versions.md"
_SERVING = "tests/serving/test_{}.py"
LOADING = [_SERVING.format(name) for name in ("bit_identity", "serve")]
SWAPPING = [_SERVING.format(name) for name in ("swap_exact", "swap_http")]
#: Asked of the environment itself. Without vLLM's banner: the last line is the answer.
FACTS = """
import json, platform
from importlib.metadata import version
facts = {name: version(name) for name in ("torch", "triton", "transformers")}
facts["python"] = platform.python_version()
try:
    from enchtable_vllm.serving import compat
    facts["swapping_lacks"] = compat.missing_for_swapping()
except ImportError as error:
    facts["reason"] = f"lacks what the loader imports: {error}"
print(json.dumps(facts))
"""


def main() -> int:
    """Run it; the exit code is 1 if a version that the table calls supported failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help="Default: all that the table has.")
    parser.add_argument("--keep", action="store_true", help="Leave the environments.")
    options = parser.parse_args()
    supported = {t.vllm for t in tested_versions() if t.passed}
    versions = options.versions or [t.vllm for t in tested_versions()]
    regressed = []
    for version in sorted(versions, key=Version, reverse=True):
        result = run(version, keep=options.keep)
        print(f"vLLM {version}: loading {' '.join(_loading(result))}", flush=True)
        print(f"vLLM {version}: swapping {' '.join(_swapping(result))}", flush=True)
        record(result)
        if version in supported and "failed" in (result.loader, result.swapping):
            regressed.append(version)
    print(f"loading works from vLLM {lower_bound()} on, swapping from {swapping_bound()} on")
    print(f"the table: {TABLE.relative_to(ROOT)}")
    return bool(regressed)


def run(version: str, *, keep: bool) -> TestedVersion:
    """Install one version, run the tests on it."""
    environment = ENVIRONMENTS / version
    python = environment / "bin" / "python"
    install = ["bash", str(ROOT / "deploy" / "cpu" / "install.sh"), str(environment), version]
    subprocess.run(install, check=True, cwd=ROOT)
    answer = subprocess.run(
        [str(python), "-c", FACTS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    facts = json.loads(answer.stdout.splitlines()[-1])
    told, failure = test(python, LOADING, ENVIRONMENTS / f"{version}-loading.xml")
    found = TestedVersion(
        vllm=version,
        loader="failed" if failure else "passed",
        tests=told,
        reason=facts.pop("reason", failure),
        date=datetime.now(UTC).date().isoformat(),
        **facts,
    )
    if found.passed and not found.swapping_lacks:
        told, failure = test(python, SWAPPING, ENVIRONMENTS / f"{version}-swapping.xml")
        found = found.model_copy(
            update={
                "swapping": "failed" if failure else "passed",
                "swapping_tests": told,
                "swapping_reason": failure,
            }
        )
    if not keep:
        shutil.rmtree(environment)
    return found


def test(python: Path, tests: list[str], report: Path) -> tuple[str, str]:
    """Run the tests of serving: how it ended, and the first failure ('': none)."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    with report.with_suffix(".log").open("w") as log:
        subprocess.run(
            [*command, f"--junitxml={report}"],
            stdout=log,
            stderr=log,
            check=False,
            cwd=ROOT,
            env={**os.environ, "ENCHTABLE_ANY_VLLM": "1"},
        )
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    outcomes = [(case.get("name"), *outcome(case)) for case in suite.iter("testcase")]
    counts = Counter(kind for _, kind, _ in outcomes)
    told = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    notes = [said for _, kind, said in outcomes if kind == "skipped"]
    failures = [f"fails {name}: {said}" for name, kind, said in outcomes if kind == "failed"]
    if not counts["passed"]:
        failures.append("runs no test")
    return "; ".join([f"{' '.join(tests)}: {told}", *notes]), failures[0] if failures else ""


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """What came of one test, and in a line why: the last error that it names, or its first line."""
    for tag, kind in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(tag)) is not None:
            lines = [line.strip() for line in (found.get("message") or "").splitlines()] or [""]
            named = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
            return kind, (named or lines[:1])[-1][:200]
    return "passed", ""


def record(result: TestedVersion) -> None:
    """Put a row into the results, and write the table from them."""
    rows = [t for t in tested_versions() if t.vllm != result.vllm] + [result]
    rows.sort(key=lambda row: Version(row.vllm))
    document = [row.model_dump(mode="json", exclude_defaults=True) for row in rows]
    TESTED_FILE.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tested_versions.cache_clear()
    TABLE.write_text(table(), encoding="utf-8")


def table() -> str:
    """The document, from the results."""
    head = ["vLLM", "torch", "Triton", "transformers", "Python", "loading", "swapping", "run"]
    lines = [
        "# Tested versions of vLLM",
        "",
        f"The loader works from vLLM {lower_bound()} on; an older one is refused by name",
        "(`ENCHTABLE_ANY_VLLM=1` lets it try: that is how the bound is found). There is no upper",
        "pin: a newer vLLM is not refused, only not vouched for, and `enchtable doctor` says so.",
        "",
        f"Exchanging vectors in a running server works from vLLM {swapping_bound()} on; what an",
        "older one lacks for it is named.",
        "",
        "Each row is a real run on the CPU build of that version, of the tests that it names.",
        "`test_bit_identity.py`: weights bit-identical to the offline merge, eager and compiled,",
        "after reload, on two ranks. `test_serve.py`: served over HTTP, and what is refused.",
        "`test_swap_exact.py`: after each swap the weights of a fresh load, on two ranks too.",
        "`test_swap_http.py`: the HTTP interface, and what running requests see of a swap. A",
        "torch without `+cpu` is PyPI's build for CUDA, on a machine without a GPU.",
        "",
        "`make test-matrix VERSIONS=...` runs a version again and writes this file.",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
    ]
    for row in reversed(tested_versions()):
        cells = [row.vllm, row.torch, row.triton, row.transformers, row.python]
        cells += ["; ".join(_loading(row)), "; ".join(_swapping(row)), row.date]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _loading(row: TestedVersion) -> list[str]:
    return [word for word in (row.loader, row.tests, row.reason) if word]


def _swapping(row: TestedVersion) -> list[str]:
    lacks = ", ".join(f"`{name}`" for name in row.swapping_lacks)
    words = (row.swapping, row.swapping_tests, row.swapping_reason, lacks and f"lacks {lacks}")
    return [word for word in words if word]


if __name__ == "__main__":
    sys.exit(main())
