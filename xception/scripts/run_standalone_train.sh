#!/usr/bin/env bash
# Xception on one Ascend NPU, batch 128.
#   sh run_standalone_train.sh DEVICE_ID DATA_PATH [--key=value ...] [-- options of train.py]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
positional DEVICE_ID DATA_PATH -- "$@"
launch xception/train.py devices=1 device=npu device_id="$DEVICE_ID" data_path="$DATA_PATH" -- --recipe=Ascend -- ${rest[@]+"${rest[@]}"}
