"""'make dist': what is released is whole, asks for what it imports, and serves from where it lies.

It is installed beside this environment's packages, without asking an index for any; and, in the
test that takes minutes, with all that it asks for into an environment that has nothing.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import httpx
import live
import pytest
from docs_text import ROOT, blocks, commands
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from enchtable_vllm.demo.server import Server, free_port
from enchtable_vllm.plan.vector_root import VectorRoot

VERSION = version("enchtable-vllm")
#: Neither part of a clone nor of a release.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "site", "shared", "fuzz-findings"
)
#: What whoever serves or plans has with vLLM; why it is not asked for is in pyproject.toml.
OF_VLLM = {"vllm", "torch", "triton", "fastapi", "starlette", "prometheus_client"}
#: What is imported only beside a package that is asked for, and that asks for it itself.
BROUGHT = {"anyio": "openai", "cryptography": "pyopenssl"}


def is_made(path):
    """Whether it is a cache, or lies in one."""
    parts = path.relative_to(ROOT).parts
    return any(
        part.startswith((".", "__pycache__")) or part.endswith(".egg-info") for part in parts
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that 'make dist' fills, in a copy of this tree."""
    source = shutil.copytree(ROOT, tmp_path_factory.mktemp("dist") / "source", ignore=LEFT_OUT)
    ready = Path(sys.prefix) / ".ready"
    command = ["make", "-o", str(ready), "dist", f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2, done.stdout
    return source / "dist"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """Commands of an environment that has the wheel, beside this environment's packages.

    So it shows that the wheel is whole, not that what it asks for is enough: see the test of that.
    """
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    # A path, whose own .pth files are not looked at: this project's editable install is none.
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    vllm = Path(sys.executable).with_name("vllm").read_text().splitlines(keepends=True)
    (home / "bin" / "vllm").write_text("".join([f"#!{python}\n", *vllm[1:]]))
    (home / "bin" / "vllm").chmod(0o755)
    return home / "bin"


@pytest.fixture
def alone(dist, tmp_path):
    """Commands of an environment that had nothing: vLLM is installed, then the wheel."""
    (wheel,) = dist.glob("*.whl")
    script, home = ROOT / "deploy" / "cpu" / "install.sh", tmp_path / "alone"
    done = subprocess.run(
        ["bash", str(script), str(home)], env={**os.environ, "PACKAGE": str(wheel)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "bin"


@pytest.fixture
def here(family, tmp_path, monkeypatch):
    """The folders that the pages name, in the current one."""
    for name in ("aligned", "surrogate", "base", "task"):
        shutil.copytree(
            getattr(family, name), tmp_path / ("my-finetune" if name == "task" else name)
        )
    shutil.rmtree(tmp_path / "my-finetune" / "safety-vector")
    live.make_root(family, tmp_path).path.rename(tmp_path / "vectors")
    VectorRoot(tmp_path / "vectors").set_current("sv-a", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return tmp_path


def test_the_sdist_is_the_whole_source(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("README.md", "LICENSE", "Makefile", "kernels/enchtable_kernels/triton_add.py"):
        assert name in held
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("enchtable_vllm", "kernels", "tests", "docs", "deploy", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not is_made(path)
    }
    assert wanted <= held
    assert not [name for name in held if "__pycache__" in name]


def test_the_wheel_is_made_of_the_sdist_and_holds_the_packages_whole(dist):
    (path,) = dist.glob("*.whl")
    held = set(zipfile.ZipFile(path).namelist())
    trees = ((ROOT, "enchtable_vllm"), (ROOT / "kernels", "enchtable_kernels"))
    wanted = {
        str(path.relative_to(root))
        for root, package in trees
        for path in (root / package).rglob("*")
        if path.is_file() and not is_made(path)
    }
    information = {name for name in held if name.startswith(f"enchtable_vllm-{VERSION}.dist-info/")}
    assert held - information == wanted
    assert f"enchtable_vllm-{VERSION}.dist-info/licenses/LICENSE" in information


def test_what_is_imported_is_asked_for(dist):
    """By the wheel itself or by one of its extras for users."""
    (path,) = dist.glob("*.whl")
    imported = set()
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            if name.endswith(".dist-info/METADATA"):
                told = message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
            if name.endswith(".py"):
                for node in ast.walk(ast.parse(wheel.read(name))):
                    if isinstance(node, ast.Import):
                        imported |= {alias.name.partition(".")[0] for alias in node.names}
                    elif isinstance(node, ast.ImportFrom) and not node.level:
                        imported.add(node.module.partition(".")[0])
    ours = {"enchtable_vllm", "enchtable_kernels"}
    foreign = imported - sys.stdlib_module_names - ours
    assert foreign >= OF_VLLM | BROUGHT.keys(), "the lists hold nothing that is not imported"
    asked = [Requirement(one) for one in told if not re.search(r'extra == "(dev|docs)"', one)]
    names = {canonicalize_name(one.name) for one in asked}
    of = packages_distributions()
    missing = {
        module
        for module in foreign - OF_VLLM - BROUGHT.keys()
        if not names & {canonicalize_name(name) for name in of.get(module, [module])}
    }
    assert missing == set()
    for module, bringing in BROUGHT.items():
        assert canonicalize_name(bringing) in names
        assert module in {Requirement(one).name for one in requires(bringing)}


def test_it_is_typed_and_of_the_wheel(installed, here):
    code = "import enchtable_vllm as v, enchtable_kernels as k; print(v.__file__, k.__file__)"
    told = subprocess.check_output([installed / "python", "-c", code], text=True, cwd=here).split()
    for file in map(Path, told):
        assert file.is_relative_to(installed.parent)
        assert (file.parent / "py.typed").exists()
    told = subprocess.check_output([installed / "enchtable", "--version"], text=True)
    assert told == f"enchtable-vllm {VERSION}\n"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quick_start_and_a_server_that_swaps(alone, here, monkeypatch):
    """docs/quickstart.md and "A server that swaps" of docs/serve.md, as they stand."""
    monkeypatch.setattr(sys, "executable", str(alone / "python"))
    listed = [alone / "python", "-m", "pip", "list", "--format", "json"]
    packages = {each["name"]: each for each in json.loads(subprocess.check_output(listed))}
    assert "editable_project_location" not in packages["enchtable-vllm"]
    assert "pytest" not in packages

    def enchtable(line):
        words = [str(alone / "enchtable"), *shlex.split(line)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        return done.stdout

    for line in commands(ROOT / "docs" / "quickstart.md"):
        enchtable(line)
    served = [line for line in blocks(ROOT / "docs" / "serve.md") if "@current" in line]
    ((_, _, model, *arguments),) = map(shlex.split, served)
    token, log = here / "token", here / "log"
    token.write_text(live.TOKEN)
    monkeypatch.setenv("VLLM_PLUGINS", "enchtable")
    monkeypatch.setenv("ENCHTABLE_ADMIN_TOKEN_FILE", str(token))
    port = free_port()
    with Server(Path(model), [*arguments, *live.ARGUMENTS[2:]], log, port=port) as server:
        told = re.findall(
            r"safety vector merged: (\d+) merged.* vector '([\w-]+)'", log.read_text()
        )
        assert told == [("8", "sv-a")]
        assert httpx.get(f"{server.url}/enchtable/ready").status_code == 200
        assert "\nenchtable_ready 1.0\n" in httpx.get(f"{server.url}/metrics").text
        said = [
            enchtable(line.replace("http://localhost:8000", server.url))
            for line in commands(ROOT / "docs" / "serve.md")
            if "--url" in line
        ]
    status, tried, swapped, rolled_back = said
    assert "sv-a" in status
    assert tried.startswith("dry run: ")
    assert swapped.startswith("swapped from sv-a to sv-b")
    assert rolled_back.startswith("rolled back from sv-b to sv-a")
