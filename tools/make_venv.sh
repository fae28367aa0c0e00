#!/usr/bin/env bash
# Make or update the environment of the Makefile: tools/make_venv.sh PYTHON VENV
#
# pip unpacks wheels in VENV/tmp, whatever the size of TMPDIR, and keeps copies of them in its cache where that has
# room. An environment whose installation did not come to its end is made anew.
set -euo pipefail
python=$1 venv=$2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages_gb=6 wheels_gb=2 # requirements-dev.txt with a CUDA build of torch: 5.8 GB, and 1.7 GB more while pip runs

existing() { # the path, or the nearest folder above it that exists
  local path=$1
  until [[ -e $path ]]; do path=$(dirname "$path"); done
  echo "$path"
}
free_gb() { df -Pk "$(existing "$1")" | awk 'NR == 2 { print int($4 * 1024 / 1e9) }'; }

incomplete=$venv.incomplete # beside the environment while it is not complete
if [[ ! -x $venv/bin/python || -e $incomplete ]]; then
  if (($(free_gb "$venv") < packages_gb + wheels_gb)); then
    echo "error: $venv: needs about $((packages_gb + wheels_gb)) GB free on its disk ($wheels_gb of them while pip" \
      "runs) and has $(free_gb "$venv"); name a folder on another disk: make VENV=/DISK/venv" >&2
    exit 2
  fi
  mkdir -p "$(dirname "$venv")"
  touch "$incomplete"
  "$python" -m venv --clear "$venv"
fi

options=(--quiet --disable-pip-version-check)
if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then options+=(-c constraints.txt); fi
cache=$("$venv/bin/python" -m pip cache dir 2>/dev/null || echo "$venv") # it fails where the user has turned it off
needed=$((wheels_gb + 1))
if [[ $(stat -c %d "$(existing "$cache")") == "$(stat -c %d "$venv")" ]]; then needed=$((needed + packages_gb + wheels_gb)); fi
if (($(free_gb "$cache") < needed)); then options+=(--no-cache-dir); fi

temporary=$(realpath "$venv")/tmp
trap 'rm -rf "$temporary"' EXIT
mkdir -p "$temporary"
TMPDIR=$temporary "$venv/bin/python" -m pip install "${options[@]}" -r requirements-dev.txt || {
  status=$?
  echo "error: $venv: pip ended with status $status; $(free_gb "$venv") GB are free on its disk" >&2
  exit $status
}
rm -f "$incomplete"
touch "$venv/.installed"
