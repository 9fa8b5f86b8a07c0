#!/usr/bin/env bash
# Installs what the tests need from the system: Debian's 'prometheus', which brings promtool, and
# 'chromium' with its driver.
#
#   bash deploy/system-deps.sh
#
# Does nothing for what is there already, whoever brought it.
set -euo pipefail

say() { printf '\033[1m>\033[0m %s\n' "$*"; }
give_up() {
  echo "system-deps: expected $1, got $2. Install ${missing[*]} by hand, on PATH." >&2
  exit 1
}

# A program, and Debian's package that brings it.
declare -A packages=([promtool]=prometheus [prometheus]=prometheus [chromium]=chromium
  [chromedriver]=chromium-driver)
missing=()
for program in "${!packages[@]}"; do
  command -v "$program" >/dev/null || missing+=("${packages[$program]}")
done
if [ "${#missing[@]}" -eq 0 ]; then
  say "$(promtool --version 2>&1 | head -n 1), $(chromium --version 2>/dev/null): already here"
  exit 0
fi
command -v apt-get >/dev/null || give_up "a system with apt-get" "none"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || give_up "root, or sudo" "user $(id -un) without it"
  as_root=(sudo)
fi
export DEBIAN_FRONTEND=noninteractive
say "installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
say "$(promtool --version 2>&1 | head -n 1), $(chromium --version 2>/dev/null): installed"
if [[ " ${missing[*]} " == *" prometheus "* ]] && [ -d /run/systemd/system ]; then
  say "Debian started a server of its own with it; the tests do not need that one:"
  say "  sudo systemctl disable --now prometheus"
fi
