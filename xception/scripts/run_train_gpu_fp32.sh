#!/usr/bin/env bash
# DEVICE_NUM GPUs in fp32, batch 64 each: DEVICE_NUM DATASET_PATH [PRETRAINED_CKPT_PATH] [--key=value ...] [-- options]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch xception/train.py recipe=GPU device=cuda devices=@DEVICE_NUM data_path=@DATASET_PATH -- --is_fp32 '[--pretrained=@PRETRAINED_CKPT_PATH]' -- "$@"
