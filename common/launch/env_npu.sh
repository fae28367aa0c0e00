# The environment of Ascend NPUs, sourced by common/launch.sh with the launcher's arguments: `source env_npu.sh "$@"`.
# Does nothing where CANN is not installed. A variable that the user has set, even to nothing, keeps its value.

# zoo_default NAME VALUE: export NAME=VALUE unless the environment has a NAME.
zoo_default() {
  [[ -v $1 ]] || export "$1=$2"
}

# zoo_cann: path of CANN's set_env.sh. CANN 8.5 and 9 live in cann/, 6 to 8.3 in ascend-toolkit/; nnae/ holds what training
# alone needs. Looked for where the installer noted its path, in /usr/local (root's choice) and in the home (a user's).
zoo_cann() {
  local root product
  for root in "${ASCEND_INSTALL_PATH:-}" \
    "$(sed -n 's/^[A-Za-z_]*Install_Path[A-Za-z_]*=//p' /etc/Ascend/ascend_cann_install.info 2>/dev/null | head -n 1)" \
    /usr/local/Ascend "${HOME:-}/Ascend"; do
    for product in cann ascend-toolkit nnae; do
      [[ -n $root && -f $root/$product/set_env.sh ]] || continue
      echo "$root/$product/set_env.sh"
      return
    done
  done
}

# zoo_key NAME WORDS: the last value of --NAME=VALUE among the words, with - or _ in the name.
zoo_key() {
  local name=$1 word value=
  shift
  for word in "$@"; do
    [[ ${word%%=*} == "--$name" || ${word%%=*} == "--${name//_/-}" ]] && value=${word#*=}
  done
  echo "$value"
}

zoo_set_npu_environment() {
  local set_env address seconds driver
  # A shell that has sourced set_env.sh has chosen its CANN. The script uses unset variables and failing tests.
  if [[ -z ${ASCEND_HOME_PATH:-}${ASCEND_TOOLKIT_HOME:-} ]]; then
    set_env=$(zoo_cann)
    [[ -n $set_env ]] || return 0
    set +eu
    # shellcheck disable=SC1090
    source "$set_env" >&2
    set -eu
  fi

  # Containers mount the driver without telling the loader; without its libascend_hal.so no card is seen.
  for driver in "${ASCEND_INSTALL_PATH:-/usr/local/Ascend}"/driver/lib64/{driver,common}; do
    [[ -d $driver && :${LD_LIBRARY_PATH:-}: != *:$driver:* ]] || continue
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$driver
  done

  # Two-stage task queue: the host prepares the next operators while the device works. With ASCEND_LAUNCH_BLOCKING=1,
  # which is for finding the line of a failure, there is no queue.
  [[ ${ASCEND_LAUNCH_BLOCKING:-0} == 1 ]] || zoo_default TASK_QUEUE_ENABLE 2
  # Chains of views (the concatenated branches of a network) are copied by one operator instead of one each.
  zoo_default COMBINED_ENABLE 1
  # Older CANN logs at other levels by default; its text would stand between the lines of the training.
  zoo_default ASCEND_GLOBAL_LOG_LEVEL 3
  zoo_default ASCEND_SLOG_PRINT_TO_STDOUT 0
  zoo_default ASCEND_GLOBAL_EVENT_ENABLE 0
  # Older CANN lets only the machines of a list take part.
  zoo_default HCCL_WHITELIST_DISABLE 1

  # HCCL would choose a network by the names of the interfaces; --local_addr says which one. Only one of the two may speak.
  address=$(zoo_key local_addr "$@")
  [[ -z $address || -v HCCL_SOCKET_IFNAME ]] || zoo_default HCCL_IF_IP "$address"
  # HCCL waits 120 s for the other ranks, but the first step compiles operators for minutes on some machines before others:
  # the launcher's own limit, within the 120 to 7200 s that HCCL takes.
  seconds=$(zoo_key rendezvous_timeout "$@")
  [[ $seconds =~ ^[0-9]{1,6}$ ]] || seconds=600
  seconds=$((10#$seconds < 120 ? 120 : 10#$seconds > 7200 ? 7200 : 10#$seconds))
  zoo_default HCCL_CONNECT_TIMEOUT "$seconds"

  # Each rank to the cores beside its card. Not where a scheduler or container has given this job some cores only: those of
  # the card may not be among them.
  if [[ $(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) == $(nproc --all) ]]; then
    zoo_default CPU_AFFINITY_CONF 1
  fi
}

zoo_set_npu_environment "$@"
