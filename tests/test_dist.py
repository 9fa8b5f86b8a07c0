"""'make dist': what is released is whole, and serves from where it is installed."""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import httpx
import live
import pytest
from docs_text import ROOT, blocks, commands

from enchtable_vllm.demo.server import Server, free_port
from enchtable_vllm.plan.vector_root import VectorRoot

VERSION = version("enchtable-vllm")
#: Neither part of a clone nor of a release.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "site", "shared", "fuzz-findings"
)


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
    """Commands of an environment that has the wheel, and beside it what this one has."""
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
def here(family, tmp_path, monkeypatch, installed):
    """The folders that the pages name, in the current one; commands are those of the wheel."""
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
    monkeypatch.setattr(sys, "executable", str(installed / "python"))
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


def test_it_is_typed_and_of_the_wheel(installed, here):
    code = "import enchtable_vllm as v, enchtable_kernels as k; print(v.__file__, k.__file__)"
    told = subprocess.check_output([installed / "python", "-c", code], text=True, cwd=here).split()
    for file in map(Path, told):
        assert file.is_relative_to(installed.parent)
        assert (file.parent / "py.typed").exists()
    told = subprocess.check_output([installed / "enchtable", "--version"], text=True)
    assert told == f"enchtable-vllm {VERSION}\n"


@pytest.mark.slow
def test_the_quick_start_and_a_server_that_swaps(installed, here, monkeypatch):
    """docs/quickstart.md and "A server that swaps" of docs/serve.md, as they stand."""

    def enchtable(line):
        words = [str(installed / "enchtable"), *shlex.split(line)]
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
