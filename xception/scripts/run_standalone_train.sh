#!/usr/bin/env bash
# Xception on one Ascend NPU, batch 128: DEVICE_ID DATA_PATH [--key=value ...] [-- options of train.py]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch xception/train.py recipe=Ascend devices=1 device=npu device_id=@DEVICE_ID data_path=@DATA_PATH -- -- "$@"
