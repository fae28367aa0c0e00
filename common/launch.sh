# Sourced by every launcher, which then calls
#
#   launch SCRIPT [key=value ...] -- [options of SCRIPT ...] -- "$@"
#
# that is: the program, the launcher's recipe, and what the user gave. common/launch.py does the rest; it is exec'ed, so
# signals and the exit status are the trainer's own.
set -euo pipefail
zoo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The Python to use: $PYTHON, an activated environment, the one that `make` created, or the system's.
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} && -x $zoo_root/.venv/bin/python ]]; then
  PYTHON=$zoo_root/.venv/bin/python
fi

launch() {
  exec "${PYTHON:-python3}" "$zoo_root/common/launch.py" "$(basename "$0" .sh)" "$zoo_root/$1" "${@:2}"
}
