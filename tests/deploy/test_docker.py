"""The image: no engine runs here, so its steps run as they stand, beside a vLLM that is there."""

import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import venv
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from manifests import DEPLOY, ROOT

from enchtable_vllm.serving import versions

FOLDER = DEPLOY / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
STEPS = re.findall(r"^RUN (?:--mount=\S+ )?(.*)$", DOCKERFILE, re.MULTILINE)


def run(command, **options):
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, **options
    )


def context(folder):
    """What '.dockerignore' lets into the build, and nothing else."""
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is left out that is not named"
    for name in (rule.removeprefix("!") for rule in rules if rule.startswith("!")):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


@pytest.fixture
def image(tmp_path):
    """A Python in which vLLM is installed and enchtable is not, as in vLLM's image."""
    folder = tmp_path / "image"
    venv.create(folder, symlinks=True)
    here = Path(sys.executable).with_name("vllm")
    site = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "base.pth").write_text(
        f"{site}\n"
    )  # its own .pth files, ours among them, are not read
    script = here.read_text().replace(here.read_text().splitlines()[0], f"#!{folder}/bin/python")
    (folder / "bin" / "vllm").write_text(script)
    (folder / "bin" / "vllm").chmod(0o755)
    return folder


def environment(image, home):
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    named = dict(re.findall(r"(\w+)=(\S+)", re.search(r"^ENV (.*)$", DOCKERFILE, re.M)[1]))
    return kept | named | {"HOME": str(home), "PATH": f"{image}/bin:{os.environ['PATH']}"}


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = run([hadolint, "--failure-threshold", "style", FOLDER / "Dockerfile"])
    assert done.stdout + done.stderr == ""


def test_the_default_version_is_a_tested_one():
    (version,) = re.findall(r"^ARG VLLM_VERSION=(.*)$", DOCKERFILE, re.MULTILINE)
    assert version in [t.vllm for t in versions.tested_versions() if t.passed]
    files = (DOCKERFILE, *(p.read_text() for p in (DEPLOY / "compose").glob("*.yaml")))
    named = {v for text in files for v in re.findall(r"vllm-openai(?:-cpu)?:v([\d.]+\d)", text)}
    assert named == {version}


def test_it_serves_as_a_user_and_holds_no_secret():
    users = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert users == ["0", "2000:0"]
    assert not re.search("token|password|api_key", DOCKERFILE, re.IGNORECASE)
    assert DOCKERFILE.rindex("USER 2000") < DOCKERFILE.index("RUN enchtable doctor")


def test_only_sources_reach_the_build(tmp_path):
    found = {path.name for path in context(tmp_path / "src").iterdir()}
    assert found == {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "enchtable_vllm",
        "kernels",
        "deploy",
    }


def test_the_builds_steps_make_an_environment_that_can_serve(image, tmp_path):
    sources, home = context(tmp_path / "src"), tmp_path / "home"
    assert len(STEPS) == 2
    before = sorted(p.name for p in sources.iterdir())
    said = []
    for step in STEPS:
        words = step.replace("/src", str(sources)).replace("/home/vllm", str(home)).split()
        done = run(words, env=environment(image, home), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in extras["optional-dependencies"]["signing"]:
        # All of it is beside this vLLM already, and pip says so of each that it looked for.
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"^Requirement already satisfied: {name}\b", said[0], re.M), said[0]
    assert "a fresh process knows '--load-format enchtable'" in re.sub(r"\s+", " ", said[1])
    assert sorted(p.name for p in sources.iterdir()) == before, "the sources are bound read-only"
    made = home.stat()
    assert made.st_mode & 0o777 == 0o770
    if os.getuid() == 0:
        assert (made.st_uid, made.st_gid) == (2000, 0)
    done = run(
        [image / "bin" / "python", "-c", "import enchtable_vllm; print(enchtable_vllm.__file__)"],
        env=environment(image, home), cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.startswith(str(image)), "what was installed is what runs"


def test_a_build_that_would_exchange_what_vllm_brought_is_refused(image, tmp_path):
    sources = context(tmp_path / "src")
    project = sources / "pyproject.toml"
    project.write_text(project.read_text().replace('"numpy>=1.26"', '"numpy<1.20"'))
    done = run(["bash", sources / "deploy" / "docker" / "install.sh", sources, tmp_path / "home"],
               env=environment(image, tmp_path))  # fmt: skip
    assert done.returncode != 0
    assert "numpy" in done.stdout + done.stderr
    assert not (tmp_path / "home").exists()


def test_an_image_without_vllm_is_refused(tmp_path):
    bash = shutil.which("bash")
    done = run([bash, FOLDER / "install.sh", ROOT, tmp_path / "home"], env={"PATH": "/nowhere"})
    assert done.returncode == 1
    assert (
        done.stderr == "install: expected 'vllm' on PATH, got none. Build on an image of vLLM's.\n"
    )


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_is_the_servers_readiness(status, healthy):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"ready": false, "reason": "ranks disagree"}')

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/enchtable/ready"
        done = run([sys.executable, FOLDER / "ready.py"], env={"READY_URL": url})
        server.shutdown()
    assert (done.returncode == 0) == healthy
    assert asked == ["/enchtable/ready"]
    assert "ranks disagree" in done.stdout + done.stderr


def test_the_health_check_of_a_server_that_is_not_up_says_so():
    done = run([sys.executable, FOLDER / "ready.py"], env={"READY_URL": "http://127.0.0.1:9"})
    assert done.returncode == 1
    assert "expected an answer" in done.stderr
