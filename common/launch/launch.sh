# Sourced by every launcher, which then calls
#
#   launch SCRIPT [key=value ...] -- [options of SCRIPT ...] -- "$@"
#
# with the program, the launcher's defaults, and the user's arguments. common/launch/launch.py does the rest; exec makes it
# receive signals directly, and its exit status that of the launcher.
set -euo pipefail
zoo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Python: $PYTHON, that of an activated environment, of the environment that `make` created, or the system's.
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} && -x $zoo_root/.venv/bin/python ]]; then
  PYTHON=$zoo_root/.venv/bin/python
fi

# positional NAME ... [NAME] ... -- "$@": assign the leading arguments, up to one that starts with --, to the variables
# NAME; a [NAME] may be missing and is then empty. The other arguments become the array `rest`.
positional() {
  local names=() name
  while [[ $1 != -- ]]; do names+=("$1"); shift; done
  shift
  for name in "${names[@]}"; do
    if [[ $# -gt 0 && $1 != --* ]]; then
      printf -v "${name//[\[\]]/}" %s "$1"
      shift
    elif [[ $name == "["* ]]; then
      printf -v "${name//[\[\]]/}" %s ""
    else
      echo "error: $name: missing; usage: $(basename "$0") ${names[*]} [--key=value ...] [-- options]" >&2
      exit 2
    fi
  done
  rest=("$@")
}

# run SCRIPT [options ...]: one process, without launch.py; a lone -- among its options is dropped.
run() {
  local options=() word
  for word in "${@:2}"; do
    [[ $word == -- ]] || options+=("$word")
  done
  source "$zoo_root/common/launch/env_npu.sh"
  exec "${PYTHON:-python3}" "$zoo_root/$1" "${options[@]}"
}

launch() {
  source "$zoo_root/common/launch/env_npu.sh"
  exec "${PYTHON:-python3}" "$zoo_root/common/launch/launch.py" "$(basename "$0" .sh)" "$zoo_root/$1" "${@:2}"
}
