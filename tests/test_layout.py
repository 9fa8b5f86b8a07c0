"""The tree's own rules: which package may import which, and what the base install brings."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Each may import itself and what stands to its right.
ORDER = [
    "cli",
    "doctor",
    "demo",
    "evaluate",
    "distill",
    "report",
    "fleet",
    "serving",
    "merge",
    "signing",
    "plan",
    "vector",
    "checkpoint",
    "errors",
]
#: Leaves that everybody may import; they import nothing of ours.
LEAVES = {"errors", "envs", "files", "page", "progress"}
FILES = sorted((ROOT / "enchtable_vllm").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


def imports(path):
    """Absolute module names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "enchtable_vllm" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    own = path.relative_to(ROOT / "enchtable_vllm").parts[0].removesuffix(".py")
    for module in imports(path):
        if module.split(".")[0] == "vllm":
            assert own == "serving", f"{path} imports {module}"
        other = package_of(module)
        if other is None or other == own or other in LEAVES or own == "__init__":
            continue
        assert own not in LEAVES, f"leaf {path} imports {module}"
        assert ORDER.index(other) > ORDER.index(own), f"{path} imports {module}"


def test_vllm_internals_are_touched_in_few_modules_only():
    users = {
        path.name
        for path in FILES
        if any(module.split(".")[0] == "vllm" for module in imports(path))
    }
    assert users == {"compat.py", "compat_swap.py", "compat_swappable.py"}


def test_model_signing_is_touched_in_one_module_only():
    users = {
        path.name
        for path in FILES
        if any(module.split(".")[0] == "model_signing" for module in imports(path))
    }
    assert users == {"library.py"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_array_libraries_only(path):
    allowed = {"torch", "triton", "numba", "numpy", "enchtable_kernels", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module in imports(path)} <= allowed


def test_kernels_stand_alone():
    """Importable from their folder alone, and no package called 'kernels' exists."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import sys, enchtable_kernels; assert 'enchtable_vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "kernels")


def test_base_install_brings_neither_torch_nor_vllm():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    heavy = ("torch", "vllm", "triton", "transformers", "accelerate")
    assert not [d for d in project["dependencies"] if d.startswith(heavy)]


def test_what_is_imported_is_declared():
    """Every third-party package that the base code imports is a dependency of the base."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {d.split(">")[0].split("[")[0].replace("-", "_") for d in project["dependencies"]}
    by_the_user = {"torch", "vllm", "enchtable_vllm", "enchtable_kernels"}
    by_vllm = {
        "fastapi",
        "opentelemetry",
        "prometheus_client",
        "starlette",
    }  # where its API server runs, and nowhere else
    extras = {
        "evaluate": {"inspect_ai", "openai", "matplotlib", "anyio"},  # inspect brings anyio
        "cli": {"inspect_ai", "openai"},
        "signing": {"model_signing", "cryptography"},  # which model-signing brings
        "plan": {"ray"},
    }
    assert {
        d.split(">")[0].replace("-", "_") for d in project["optional-dependencies"]["evaluation"]
    } == extras["evaluate"] - {"anyio"}
    for path in FILES:
        package = path.relative_to(ROOT).parts[1]
        if package in ("demo", "distill"):  # these bring what they import
            continue
        used = {module.split(".")[0] for module in imports(path)}
        used -= by_the_user | by_vllm | set(sys.stdlib_module_names) | extras.get(package, set())
        assert used <= declared, path


def test_files_stay_readable():
    files = FILES + KERNELS + BENCHMARKS
    assert not {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 400}


def test_the_entry_point_is_named_for_vllm_plugins():
    """One name in every group, so that VLLM_PLUGINS=enchtable is all it takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["entry-points"]
    assert groups["vllm.general_plugins"] == {
        "enchtable": "enchtable_vllm.serving.registration:register"
    }
    assert all(list(names) == ["enchtable"] for names in groups.values())
