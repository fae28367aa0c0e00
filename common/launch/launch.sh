# Sourced by every launcher, which then calls
#
#   launch SCRIPT [key=value ...] -- [options of SCRIPT ...] -- "$@"
#
# with its recipe and number of devices among the keys; @NAME stands for a positional argument of the user. launch.py does
# the rest; exec makes it receive signals directly, and its exit status that of the launcher.
set -euo pipefail
zoo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Python: $PYTHON, that of an activated environment, of the environment that `make` created, or the system's.
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} && -x $zoo_root/.venv/bin/python ]]; then
  PYTHON=$zoo_root/.venv/bin/python
fi

# fill "$@": replace @NAME in the words of the array `template` by the leading arguments, in order, up to one that starts
# with --. A word in [brackets] may lack its argument. The other arguments become the array `rest`.
fill() {
  local i names=() missing='' pattern='^(\[?)([^@]*)@([A-Z_]+)(\]?)$'
  for i in "${!template[@]}"; do
    [[ ${template[i]} =~ $pattern ]] || continue
    names+=("${BASH_REMATCH[1]}${BASH_REMATCH[3]}${BASH_REMATCH[4]}")
    if [[ $# -gt 0 && $1 != --* ]]; then
      template[i]=${BASH_REMATCH[2]}$1
      shift
    else
      [[ -n ${BASH_REMATCH[1]} ]] || missing=${missing:-${BASH_REMATCH[3]}}
      template[i]=${BASH_REMATCH[2]}
    fi
  done
  if [[ -n $missing ]]; then
    echo "error: $missing: missing; usage: $(basename "$0") ${names[*]} [--key=value ...] [-- options]" >&2
    exit 2
  fi
  rest=("$@")
}

# run SCRIPT [OPTION ...] -- "$@": one process, without launch.py; a lone -- among the user's options is dropped.
run() {
  local script=$1 template=() rest options=() word
  shift
  while [[ $1 != -- ]]; do
    template+=("$1")
    shift
  done
  fill "${@:2}"
  for word in ${rest[@]+"${rest[@]}"}; do
    [[ $word == -- ]] || options+=("$word")
  done
  source "$zoo_root/common/launch/env_npu.sh"
  exec "${PYTHON:-python3}" "$zoo_root/$script" "${template[@]}" ${options[@]+"${options[@]}"}
}

launch() {
  local script=$1 template=() rest separators=0
  shift
  while ((separators < 2)); do
    [[ $1 == -- ]] && separators=$((separators + 1))
    template+=("$1")
    shift
  done
  fill "$@"
  source "$zoo_root/common/launch/env_npu.sh"
  exec "${PYTHON:-python3}" "$zoo_root/common/launch/launch.py" "$(basename "$0" .sh)" "$zoo_root/$script" \
    "${template[@]}" ${rest[@]+"${rest[@]}"}
}
