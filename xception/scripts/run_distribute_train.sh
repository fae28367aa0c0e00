#!/usr/bin/env bash
# 8 Ascend NPUs, batch 8 x 128, reported top-1 79.8: RANK_TABLE_FILE DATA_PATH [--key=value ...] [-- options]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch xception/train.py recipe=Ascend devices=8 device=npu rank_table_file=@RANK_TABLE_FILE data_path=@DATA_PATH -- --is_distributed -- "$@"
