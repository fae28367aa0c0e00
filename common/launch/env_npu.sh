# Environment of Ascend NPUs, sourced by common/launch/launch.sh. Does nothing without CANN. A variable that the user has
# set, even to an empty value, is kept. HCCL's variables that depend on options are set by common/device/cann.py.

# zoo_default NAME VALUE: export NAME=VALUE unless NAME is set.
zoo_default() {
  [[ -v $1 ]] || export "$1=$2"
}

zoo_set_npu_environment() {
  local set_env driver
  # If the user has sourced a set_env.sh, that CANN is used. The script reads unset variables and has failing commands.
  if [[ -z ${ASCEND_HOME_PATH:-}${ASCEND_TOOLKIT_HOME:-} ]]; then
    set_env=$(bash "$(dirname "${BASH_SOURCE[0]}")/../device/find_cann.sh")
    [[ -n $set_env ]] || return 0
    set +eu
    # shellcheck disable=SC1090
    source "$set_env" >&2
    set -eu
  fi

  # Containers mount the driver without configuring the loader; without its libascend_hal.so no card is found.
  for driver in "${ASCEND_INSTALL_PATH:-/usr/local/Ascend}"/driver/lib64/{driver,common}; do
    [[ -d $driver && :${LD_LIBRARY_PATH:-}: != *:$driver:* ]] || continue
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$driver
  done

  # Two-stage task queue: the host prepares operators while the device computes. ASCEND_LAUNCH_BLOCKING=1, for debugging,
  # excludes it.
  [[ ${ASCEND_LAUNCH_BLOCKING:-0} == 1 ]] || zoo_default TASK_QUEUE_ENABLE 2
  # Copies a chain of views (concatenated branches of a network) with one operator instead of one per view.
  zoo_default COMBINED_ENABLE 1
  # Older CANN prints more by default, between the lines of the training.
  zoo_default ASCEND_GLOBAL_LOG_LEVEL 3
  zoo_default ASCEND_SLOG_PRINT_TO_STDOUT 0
  zoo_default ASCEND_GLOBAL_EVENT_ENABLE 0
  # Older CANN accepts only nodes of an allowlist.
  zoo_default HCCL_WHITELIST_DISABLE 1

  # Bind each rank to the cores near its card, unless a scheduler or container restricts this job to some cores, which
  # may not include them.
  if [[ $(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) == $(nproc --all) ]]; then
    zoo_default CPU_AFFINITY_CONF 1
  fi
}

zoo_set_npu_environment
