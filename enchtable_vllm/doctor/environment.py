"""This Python environment: vLLM, torch, the plugin, Triton, packages that break a CPU install."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from enchtable_vllm.doctor.child import Step, run_steps
from enchtable_vllm.doctor.finding import Finding
from enchtable_vllm.serving import versions

#: Built for CUDA they break 'import transformers' beside a CPU torch; serving text needs none.
_BREAKING = ("torchvision", "torchaudio", "torchcodec")
_INSTALL = "See 'Install' in the README; without a GPU: bash deploy/cpu/install.sh."
#: Those that decide what is loaded, and from where.
_VARIABLES = ("VLLM_PLUGINS", "HF_HUB_OFFLINE", "ENCHTABLE_CACHE", "TRITON_INTERPRET")


def check_environment() -> list[Finding]:
    """All of it. Two child processes at most; about ten seconds where vLLM is installed."""
    present = [name for name in _BREAKING if importlib.util.find_spec(name)]
    beside = run_steps(["torch", *present]) if present else {}
    has_torch = importlib.util.find_spec("torch") is not None
    has_vllm = importlib.util.find_spec("vllm") is not None
    steps = ["torch"] * has_torch + ["vllm", "entry_point", "loader", "swapping"] * has_vllm
    steps += ["triton", "fused_add"] * has_torch
    found = run_steps(steps) if steps else {}
    return [
        _variables(),
        _torch(found.get("torch")),
        *(_breaking(name, beside[name]) for name in present),
        *_vllm(found.get("vllm")),
        _plugin(found),
        _swapping(found),
        _triton(found),
    ]


def _variables() -> Finding:
    shown = ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in _VARIABLES)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return Finding(
            "environment variables",
            "warn",
            shown,
            "Triton's interpreter is on: kernels run element by element in Python",
            "Unset TRITON_INTERPRET to serve.",
        )
    return Finding("environment variables", "ok", shown)


def _torch(step: Step | None) -> Finding:
    if step is None:
        return Finding(
            "torch",
            "fail",
            "not installed",
            "this package leaves the choice of a torch to you, and nothing else brought one",
            f"Install vLLM, which brings the torch it was built for. {_INSTALL}",
        )
    if step.error:
        return Finding("torch", "fail", "installed, but 'import torch' fails", step.error, _INSTALL)
    devices = ", ".join(step.value["devices"]) if step.value["cuda"] else "CPU"
    return Finding("torch", "ok", f"{step.value['version']} on {devices}")


def _breaking(name: str, step: Step) -> Finding:
    if step.error:
        return Finding(
            name,
            "fail",
            f"installed, but 'import {name}' fails, and so does what imports it where present",
            step.error,
            f"Serving text does not need it: pip uninstall {name}; or install the build that was "
            "made for this torch.",
        )
    return Finding(name, "ok", f"{step.value['version']}, imports")


def _vllm(step: Step | None) -> list[Finding]:
    distributions = {name: _version(name) for name in versions.DISTRIBUTIONS}
    names = ", ".join(f"{name} {v}" for name, v in distributions.items() if v)
    if step is None:
        cure = f"To serve, install it. {_INSTALL} The other commands need torch only."
        status = "not installed" if not names else f"'{names}' is installed without its files"
        return [Finding("vLLM", "fail", status, "there is no module 'vllm' here", cure)]
    if step.error:
        found = f"{names or 'a source tree'}; 'import vllm' fails"
        return [Finding("vLLM", "fail", found, step.error, f"Repair that first. {_INSTALL}")]
    if distributions["vllm"] is None and names:
        return [
            Finding(
                "vLLM",
                "fail",
                f"{names}, and no distribution named 'vllm'",
                "the 'vllm' command asks for the version of 'vllm', and finds its platform in it",
                "Install that name beside it: deploy/cpu/install.sh does, from "
                "deploy/cpu/vllm-on-cpu.",
            )
        ]
    imports = Finding("vLLM", "ok", f"{names or step.value['version']}, imports")
    return [imports, _standing(distributions["vllm"] or str(step.value["version"]))]


def _standing(installed: str) -> Finding:
    name, bound, newest = "vLLM version", versions.lower_bound(), versions.newest_tested()
    standing = versions.standing(installed)
    tested = f"tested: {', '.join(t.vllm for t in versions.tested_versions() if t.passed)}"
    match standing:
        case "tested":
            return Finding(name, "ok", f"{installed}, tested")
        case "too old":
            return Finding(
                name,
                "fail",
                f"{installed}; the loader needs {bound} or newer",
                versions.why_too_old(installed),
                "Upgrade vLLM, or merge offline with 'enchtable merge'.",
            )
        case "newer than tested":
            cause = f"the newest that this release was tested on is {newest}"
        case "between tested versions":
            cause = "it lies between tested versions"
        case "unknown":
            cause = "it says no release"
    cure = "Nothing stops you; if something fails, compare with a tested version."
    return Finding(name, "warn", f"{installed}; {tested}", cause, cure)


def _plugin(found: Mapping[str, Step]) -> Finding:
    name = "plugin"
    if "vllm" not in found:
        return Finding(name, "skip", "no vLLM to load it")
    if found["vllm"].error:
        return Finding(name, "skip", "vLLM does not import")
    entry, loader = found["entry_point"], found["loader"]
    reinstall = "Install this package again in vLLM's own environment: pip install ."
    if not entry.error and not entry.value["entry_points"]:
        cause = "no distribution in this environment offers the entry point 'enchtable'"
        return Finding(name, "fail", "not registered with vLLM", cause, reinstall)
    if entry.error:
        what = "the entry point is there, but importing what it names fails"
        return Finding(name, "fail", what, entry.error, reinstall)
    if not loader.error:
        return Finding(name, "ok", "a fresh process knows '--load-format enchtable'")
    what = "a fresh process does not know '--load-format enchtable'"
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "enchtable" not in chosen.split(","):
        cause = f"VLLM_PLUGINS='{chosen}' filters it out"
        return Finding(name, "fail", what, cause, "Add 'enchtable' to it, or unset it.")
    cure = "Repair what it names; then run this again."
    return Finding(name, "fail", what, loader.error, cure)


def _swapping(found: Mapping[str, Step]) -> Finding:
    name, loader = "swapping", found.get("loader")
    if loader is None or loader.error:
        return Finding(name, "skip", "no loader to swap in")
    step = found["swapping"]
    if step.error:
        what = "what it needs of vLLM cannot be looked for"
        return Finding(name, "warn", what, step.error, "Loading works without; report it.")
    if lacks := step.value["lacks"]:
        return Finding(
            name,
            "warn",
            "vectors cannot be exchanged while a server runs; loading works",
            f"this vLLM lacks {', '.join(lacks)}",
            f"Upgrade vLLM to {versions.swapping_bound()} or newer, or restart to change vectors.",
        )
    return Finding(name, "ok", "this vLLM has all that exchanging vectors needs")


def _triton(found: Mapping[str, Step]) -> Finding:
    name = "fused addition"
    torch, triton, add = (found.get(step) for step in ("torch", "triton", "fused_add"))
    if torch is None or torch.error or triton is None or add is None:
        return Finding(name, "skip", "no torch to run it")
    on_gpu = bool(torch.value["cuda"])
    version = f"Triton {triton.value['version']}" if not triton.error else "no usable Triton"
    if on_gpu and triton.error:
        cure = "Install the Triton that your torch was built with."
        return Finding(name, "fail", f"{version}, which a GPU needs", triton.error, cure)
    if add.error:
        what = f"fails on this {'GPU' if on_gpu else 'CPU'} ({version})"
        cure = "Report it with the versions above. 'enchtable merge' on a CPU gives the same bits."
        return Finding(name, "fail", what, add.error, cure)
    how = f"Triton's kernel ({version})" if on_gpu else f"the CPU path; {version} is not used"
    return Finding(name, "ok", f"{how}; its bits are the reference's")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
