"""``enchtable doctor`` in environments that are really broken, and on artefacts that are."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner
from users import nobody

from enchtable_vllm import cli
from enchtable_vllm.doctor import environment
from enchtable_vllm.doctor.child import Step, run_steps
from enchtable_vllm.doctor.folders import check_cache, check_vector_root
from enchtable_vllm.serving.versions import lower_bound, swapping_bound

ROOT = Path(__file__).parent.parent
MAIN = "from enchtable_vllm.cli import main; main()"


def command(*arguments, code, python=sys.executable, **variables):
    """The command in a process of its own: (standard output, standard error)."""
    done = subprocess.run(
        [str(python), "-P", "-c", MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def doctor(*arguments, code, **variables):
    """Its findings by name."""
    out, _ = command("doctor", "--json", *arguments, code=code, **variables)
    report = json.loads(out)
    assert report["healthy"] is (code == 0)
    return {finding["name"]: finding for finding in report["findings"]}


def on_path(*folders):
    """A PYTHONPATH with these before whatever is on it, and this tree."""
    return os.pathsep.join(map(str, [*folders, ROOT, ROOT / "kernels"]))


def distribution(folder, name, files=(), version="9.0", **entry_points):
    """What pip leaves of an installed distribution, as far as importlib.metadata reads it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"[{group}]\n{entry}" for group, entry in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for path, text in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def test_a_healthy_environment_root_and_model(family, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(family.vector, root / "sv")
    planned_for = json.loads(family.plan.read_text())["task_model"]["fingerprint"]
    plan = root / "sv" / "plans" / f"{planned_for.removeprefix('blake3:')}.json"
    plan.parent.mkdir()
    shutil.copyfile(family.plan, plan)
    found = doctor("--vector-root", root, "--model", family.task, code=0)
    assert {name: finding["status"] for name, finding in found.items()} == dict.fromkeys(
        ["environment variables", "torch", "vLLM", "vLLM version", "plugin", "swapping",
         "fused addition", "cache", f"vector root '{root}'", "vector 'sv'", "model",
         "dry run, 'sv'"],
        "ok",
    )  # fmt: skip
    assert found["vLLM version"]["found"].endswith("tested")
    assert found["plugin"]["found"] == "a fresh process knows '--load-format enchtable'"
    assert "would merge 8 and keep 13 tensors" in found["dry run, 'sv'"]["found"]
    assert not any(finding["cause"] or finding["cure"] for finding in found.values())


def test_a_filtered_plugin_a_cache_in_a_file_and_triton_interpreted(tmp_path):
    (tmp_path / "file").write_text("")
    found = doctor(
        code=1,
        VLLM_PLUGINS="other",
        ENCHTABLE_CACHE=str(tmp_path / "file" / "cache"),
        TRITON_INTERPRET="1",
    )
    assert found["plugin"]["status"] == "fail"
    assert found["plugin"]["cause"] == "VLLM_PLUGINS='other' filters it out"
    assert "Add 'enchtable' to it" in found["plugin"]["cure"]
    assert found["cache"]["status"] == "fail"
    assert "NotADirectoryError" in found["cache"]["cause"]
    assert "ENCHTABLE_CACHE" in found["cache"]["cure"]
    shown = found["environment variables"]
    assert "VLLM_PLUGINS=other" in shown["found"]
    assert (shown["status"], "interpreter" in shown["cause"]) == ("warn", True)
    assert found["vLLM"]["status"] == "ok"


#: What torchvision's build for CUDA does beside a CPU torch: its operators are in a library that
#: does not load, and the first function that names one fails.
TORCHVISION = """
import torch
torch.library.register_fake("torchvision::nms")(lambda *tensors: None)
"""


def test_a_torchvision_that_does_not_import_is_named_as_the_root_cause(tmp_path):
    """And so is each of the packages that are built for a device."""
    files = [
        ("torchvision/__init__.py", TORCHVISION),
        ("torchaudio/__init__.py", "__version__ = '9'"),
        ("torchcodec/__init__.py", "raise OSError('libavutil.so.60: cannot open shared object')"),
    ]
    shim = distribution(tmp_path / "shim", "torchvision", files)
    found = doctor(code=1, PYTHONPATH=on_path(shim))
    broken = found["torchvision"]
    assert broken["status"] == "fail"
    assert broken["cause"] == "RuntimeError: operator torchvision::nms does not exist"
    assert "pip uninstall torchvision" in broken["cure"]
    assert (
        found["plugin"]["cause"] == broken["cause"]
    )  # under what vLLM and transformers wrap it in
    assert found["torch"]["status"] == "ok"
    assert (found["torchaudio"]["status"], found["torchaudio"]["found"]) == ("ok", "9, imports")
    assert found["torchcodec"]["status"] == "fail"
    assert found["torchcodec"]["cause"].startswith("OSError: libavutil.so.60")
    assert "pip uninstall torchcodec" in found["torchcodec"]["cure"]


#: An addition that does nothing, in front of the reference that it is held to.
KERNELS = """
__path__ = [*__path__, {real!r}]
def fused_add(stored, delta, coefficients):
    return stored.clone(), None
"""


def test_a_fused_addition_of_other_bits_fails(tmp_path, monkeypatch):
    real = str(ROOT / "kernels" / "enchtable_kernels")
    files = [
        ("enchtable_kernels/__init__.py", KERNELS.format(real=real)),
        ("triton/__init__.py", "raise ImportError('no driver')"),
    ]
    monkeypatch.setenv("PYTHONPATH", str(distribution(tmp_path, "shim", files)))
    found = run_steps(["torch", "triton", "fused_add"])
    finding = environment._triton(found)
    assert finding.status == "fail"
    assert finding.found == "fails on this CPU (no usable Triton)"
    assert re.fullmatch(
        r"RuntimeError: \d+ of 1000 elements differ from the reference", finding.cause
    )
    assert "'enchtable merge' on a CPU" in finding.cure


@pytest.mark.parametrize(
    ("triton", "add", "found", "cause"),
    [
        (Step(error="no driver"), Step(), "no usable Triton, which a GPU needs", "no driver"),
        (Step({"version": "9"}), Step(error="no PTX"), "fails on this GPU (Triton 9)", "no PTX"),
    ],
)
def test_a_gpu_without_a_usable_triton_fails(triton, add, found, cause):
    steps = {"torch": Step({"cuda": True}), "triton": triton, "fused_add": add}
    finding = environment._triton(steps)
    assert (finding.status, finding.found, finding.cause) == ("fail", found, cause)
    assert finding.cure


def test_what_a_vllm_lacks_for_swapping_is_named():
    lacks = {"lacks": ["vllm.endpoint_plugins", "update_weight_version"]}
    finding = environment._swapping({"loader": Step(), "swapping": Step(lacks)})
    assert finding.status == "warn"  # it serves all the same
    assert finding.cause == "this vLLM lacks vllm.endpoint_plugins, update_weight_version"
    assert f"vLLM to {swapping_bound()} or newer" in finding.cure
    failed = environment._swapping({"loader": Step(), "swapping": Step(error="gone")})
    assert (failed.status, failed.cause) == ("warn", "gone")
    assert environment._swapping({"loader": Step(error="x")}).status == "skip"


def test_a_stale_entry_point_is_named_with_the_import_that_fails(tmp_path):
    """A second, older installation earlier on the path hides this one's entry point."""
    entry = {"vllm.general_plugins": "enchtable = enchtable_gone.registration:register"}
    shim = distribution(tmp_path / "shim", "enchtable_vllm", **entry)
    found = doctor(code=1, PYTHONPATH=on_path(shim))
    assert found["vLLM"]["status"] == "ok"
    assert found["plugin"]["status"] == "fail"
    assert "importing what it names fails" in found["plugin"]["found"]
    assert found["plugin"]["cause"] == "ModuleNotFoundError: No module named 'enchtable_gone'"


def test_a_vllm_that_is_too_old_is_refused_by_name(tmp_path):
    """By what it says of itself: the loader's own refusal, met where vLLM makes the loader."""
    shim = distribution(tmp_path / "shim", "vllm", version="0.9.0+cpu")
    found = doctor(code=1, PYTHONPATH=on_path(shim))
    old = found["vLLM version"]
    assert old["status"] == "fail"
    assert f"needs {lower_bound()} or newer" in old["found"]
    refusal = f"--load-format enchtable: expected vLLM {lower_bound()} or newer, got 0.9.0+cpu ("
    assert refusal in found["plugin"]["cause"]


@pytest.fixture
def without_torch(tmp_path):
    """A Python whose site-packages have everything that these have but torch and vLLM."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (target,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    left_out = ("torch", "vllm", "triton", "transformers", "functorch", "__editable__", "enchtable")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(left_out):
            (target / path.name).symlink_to(path)
    return tmp_path / "venv" / "bin" / "python"


def test_neither_torch_nor_vllm(without_torch, family, tmp_path):
    environment = {"python": without_torch, "PYTHONPATH": on_path()}
    out, _ = command("--help", code=0, **environment)
    assert "doctor" in out
    root = tmp_path / "root"
    shutil.copytree(family.vector, root / "sv")
    found = doctor("--vector-root", root, "--model", family.task, code=1, **environment)
    assert found["torch"]["found"] == found["vLLM"]["found"] == "not installed"
    assert found["vLLM"]["status"] == "fail"
    for name in ("plugin", "swapping", "fused addition", "vector 'sv'", "dry run"):
        assert found[name]["status"] == "skip", name
    _, error = command("plan", code=1, **environment)
    assert error.startswith("ConfigError: 'enchtable plan': expected torch in this environment")


def test_a_child_that_crashes_or_hangs_fails_the_step_it_was_in(tmp_path, monkeypatch):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    files = [("torchaudio/__init__.py", "__version__ = '9'"), ("torchcodec/__init__.py", crash)]
    monkeypatch.setenv("PYTHONPATH", str(distribution(tmp_path, "shim", files)))
    found = run_steps(["torchaudio", "torchcodec", "torchvision"])
    assert found["torchaudio"].value == {"version": "9"}
    assert found["torchcodec"].error == "the process ended by SIGSEGV"
    assert found["torchvision"].error == "not reached"
    (tmp_path / "torchcodec" / "__init__.py").write_text("import time; time.sleep(60)")
    assert run_steps(["torchcodec"], timeout_seconds=1)["torchcodec"].error == "no end after 1 s"


def test_the_first_error_of_a_chain_is_the_cause(tmp_path, monkeypatch):
    """Whatever wraps an import error says less than the error itself."""
    chain = "try:\n    import gone\nexcept ImportError as e:\n    raise RuntimeError('no') from e"
    files = [("torchcodec/__init__.py", chain)]
    monkeypatch.setenv("PYTHONPATH", str(distribution(tmp_path, "shim", files)))
    found = run_steps(["torchcodec"])["torchcodec"]
    assert found.error == "ModuleNotFoundError: No module named 'gone'"


def test_the_cache_is_not_made_by_asking(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCHTABLE_CACHE", str(tmp_path / "a" / "b"))
    assert check_cache().status == "ok"
    assert check_cache().found.startswith(f"'{tmp_path / 'a' / 'b' / 'plans'}'")
    assert list(tmp_path.iterdir()) == []


def statuses(findings):
    return {finding.name: finding.status for finding in findings}


def test_a_root_that_everybody_can_write_to(family, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(family.vector, root / "sv")
    assert statuses(check_vector_root(root)) == {f"vector root '{root}'": "ok", "vector 'sv'": "ok"}
    for path in (root, root / "sv", root / "sv" / "safety_vector.json"):
        before = path.stat().st_mode
        path.chmod(before | stat.S_IWOTH)
        finding = check_vector_root(root)[0]
        assert finding.status == "fail"
        assert finding.cause == f"the first: '{path}'"
        assert f"chmod -R o-w '{root}'" in finding.cure
        path.chmod(before)


def test_a_root_that_a_group_can_write_to(family, tmp_path):
    """Healthy: a group may be the server's own. But it is said."""
    root = tmp_path / "root"
    shutil.copytree(family.vector, root / "sv")
    manifest = root / "sv" / "safety_vector.json"
    manifest.chmod(manifest.stat().st_mode | stat.S_IWGRP)
    finding = check_vector_root(root)[0]
    assert finding.status == "warn"
    assert finding.found.startswith("1 path(s)")
    assert finding.cause == f"the first: '{manifest}', group {manifest.stat().st_gid}"
    assert f"chmod -R g-w '{root}'" in finding.cure
    manifest.chmod(manifest.stat().st_mode | stat.S_IWOTH)
    assert check_vector_root(root)[0].status == "fail"


def test_a_root_below_a_folder_that_everybody_can_write_to(family, tmp_path):
    root = tmp_path / "shared" / "root"
    shutil.copytree(family.vector, root / "sv")
    root.parent.chmod(0o777)
    finding = check_vector_root(root)[0]
    assert finding.status == "fail"
    assert finding.cause == f"the first: '{root.parent}'"
    assert finding.cure.endswith(f"another root in its place: chmod o-w '{root.parent}'.")
    root.parent.chmod(0o1777)  # as /tmp: nobody renames what is another's
    assert check_vector_root(root)[0].status == "ok"


def test_a_root_that_belongs_to_somebody_else(family, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(family.vector, root / "sv")
    manifest = root / "sv" / "safety_vector.json"
    if os.geteuid() == 0:
        os.chown(manifest, 65534, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    finding = check_vector_root(root)[0]
    assert finding.status == "warn"
    assert "belong to another user than root and this one" in finding.found
    assert finding.cause.endswith(f"user {manifest.stat().st_uid}")


@pytest.mark.parametrize("inside", ["sv/plans", "sv/safety_vector.json"])
def test_a_root_with_what_this_user_cannot_read(family, inside):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are private
        root = Path(name)
        root.chmod(0o755)
        shutil.copytree(family.vector, root / "sv")
        (root / "sv" / "plans").mkdir()
        closed = root / inside
        closed.chmod(0)
        with nobody():
            finding = check_vector_root(root)[0]
        assert finding.status == "fail"
        assert finding.found == "1 path(s) that this user cannot read"
        assert finding.cause == f"the first: '{closed}'"


def test_a_root_with_damaged_vectors(family, tmp_path):
    root = tmp_path / "root"
    for name in ("good", "no-manifest", "truncated"):
        shutil.copytree(family.vector, root / name)
    (root / "no-manifest" / "safety_vector.json").unlink()
    weights = root / "truncated" / "safety_vector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    found = {finding.name: finding for finding in check_vector_root(root)}
    assert found["vector 'good'"].status == "ok"
    assert found["vector 'no-manifest'"].cause.startswith("SafetyVectorError: expected a file")
    assert "truncated or corrupt" in found["vector 'truncated'"].cure
    assert found["vector 'truncated'"].status == "fail"


def test_a_root_that_is_missing_or_empty(tmp_path):
    (missing,) = check_vector_root(tmp_path / "none")
    assert (missing.status, "No such file" in missing.cause) == ("fail", True)
    (empty,) = check_vector_root(tmp_path)
    assert empty.status == "warn"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--safety-vector", "v"],
        ["--model", "m", "--base-model", "b"],
        ["--model", "m", "--safety-vector", "v", "--base-model", "b", "--merge-plan", "p"],
        ["--everything"],
    ],
)
def test_wrong_usage(arguments):
    assert CliRunner().invoke(cli.app, ["doctor", *arguments]).exit_code == 2
