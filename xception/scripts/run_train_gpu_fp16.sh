#!/usr/bin/env bash
# DEVICE_NUM GPUs in fp16, batch 64 each, on 8 reported top-1 79.8: DEVICE_NUM DATASET_PATH [PRETRAINED_CKPT_PATH] ...
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch xception/train.py recipe=GPU device=cuda devices=@DEVICE_NUM data_path=@DATASET_PATH -- '[--pretrained=@PRETRAINED_CKPT_PATH]' -- "$@"
