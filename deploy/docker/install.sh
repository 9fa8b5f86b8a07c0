#!/usr/bin/env bash
# Puts enchtable beside the vLLM that is on PATH, and changes nothing that is there already.
#
#   bash deploy/docker/install.sh SOURCES HOME_FOLDER
#
# What deploy/docker/Dockerfile runs as root. HOME_FOLDER is made for the user 2000, whom vLLM's
# images call 'vllm', and for group 0, which is whom OpenShift starts containers as.
set -euo pipefail

sources=${1:?the folder of the sources}
home=${2:?the home folder of whoever serves}
say() { printf '> %s\n' "$*"; }

vllm=$(command -v vllm) || {
  echo "install: expected 'vllm' on PATH, got none. Build on an image of vLLM's." >&2
  exit 1
}
python=$(sed -n '1s/^#! *//p' "$vllm")
if [ ! -x "$python" ]; then
  echo "install, '$vllm': expected a script of Python's, got '#!$python'. Build on an image of vLLM's." >&2
  exit 1
fi
say "vLLM's Python is $python"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
versions() {
  "$python" - <<'PYTHON'
from importlib.metadata import distributions

found = {f"{d.name}=={d.version}" for d in distributions() if d.name != "enchtable-vllm"}
print("\n".join(sorted(found)))
PYTHON
}
versions > "$scratch/before"

# From a copy: setuptools leaves its build folder in the sources, and those are read-only.
cp -r "$sources" "$scratch/sources"
if "$python" -m pip --version > /dev/null 2>&1; then
  add=("$python" -m pip install --progress-bar off --no-cache-dir --root-user-action=ignore
    --break-system-packages)
else
  add=(uv pip install --no-cache --python "$python" --break-system-packages)
fi
# The constraint makes a conflict with what vLLM brought an error, not an exchange of its torch.
# 'signing', because a server with require_signature needs it; the other extras are no server's.
"${add[@]}" --constraint "$scratch/before" "$scratch/sources[signing]"

versions > "$scratch/after"
changed=$(LC_ALL=C comm -23 "$scratch/before" "$scratch/after")
if [ -n "$changed" ]; then
  echo "install: expected what vLLM brought to stay, got other versions of:" "$changed" >&2
  exit 1
fi
say "beside it came: $(LC_ALL=C comm -13 "$scratch/before" "$scratch/after" | paste -sd ' ')"

install -d -o 2000 -g 0 -m 0770 "$home"
