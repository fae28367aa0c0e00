# Sourced by every launcher, which then calls
#
#   launch SCRIPT [key=value ...] -- [options of SCRIPT ...] -- "$@"
#
# that is: the program, the launcher's recipe, and what the user gave. common/launch/launch.py does the rest; it is exec'ed, so
# signals and the exit status are the trainer's own.
set -euo pipefail
zoo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# The Python to use: $PYTHON, an activated environment, the one that `make` created, or the system's.
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} && -x $zoo_root/.venv/bin/python ]]; then
  PYTHON=$zoo_root/.venv/bin/python
fi

# positional NAME ... [NAME] ... -- "$@": the leading arguments, up to one that starts with --, become the variables NAME;
# a [NAME] may be absent. What follows them becomes the array `rest`.
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

# run SCRIPT ...: one process, without the launcher; a lone -- among its options means nothing
run() {
  local options=() word
  for word in "${@:2}"; do
    [[ $word == -- ]] || options+=("$word")
  done
  source "$zoo_root/common/launch/env_npu.sh"
  exec "${PYTHON:-python3}" "$zoo_root/$1" "${options[@]}"
}

launch() {
  source "$zoo_root/common/launch/env_npu.sh" "$@"
  exec "${PYTHON:-python3}" "$zoo_root/common/launch/launch.py" "$(basename "$0" .sh)" "$zoo_root/$1" "${@:2}"
}
