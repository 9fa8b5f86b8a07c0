#!/usr/bin/env bash
# Installs what the tests need from the system: Debian's 'prometheus', which brings promtool.
#
#   bash deploy/system-deps.sh
#
# Does nothing where both are there already, whoever brought them.
set -euo pipefail

say() { printf '\033[1m>\033[0m %s\n' "$*"; }
give_up() {
  echo "system-deps: expected $1, got $2. Install 'prometheus' and 'promtool' by hand, on PATH." >&2
  exit 1
}

if command -v promtool >/dev/null && command -v prometheus >/dev/null; then
  say "$(promtool --version 2>&1 | head -n 1): already here"
  exit 0
fi
command -v apt-get >/dev/null || give_up "a system with apt-get" "none"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || give_up "root, or sudo" "user $(id -un) without it"
  as_root=(sudo)
fi
export DEBIAN_FRONTEND=noninteractive
say "installing prometheus"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends prometheus >/dev/null
say "$(promtool --version 2>&1 | head -n 1): installed"
if [ -d /run/systemd/system ]; then
  say "Debian started a server of its own with it; the tests do not need that one:"
  say "  sudo systemctl disable --now prometheus"
fi
