#!/usr/bin/env bash
# Xception on DEVICE_NUM GPUs in fp32, batch 64 each.
#   sh run_train_gpu_fp32.sh DEVICE_NUM DATASET_PATH [PRETRAINED_CKPT_PATH] [--key=value ...] [-- options of train.py]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
positional DEVICE_NUM DATASET_PATH "[PRETRAINED_CKPT_PATH]" -- "$@"
launch xception/train.py devices="$DEVICE_NUM" device=cuda data_path="$DATASET_PATH" \
  -- --recipe=GPU --is_fp32 --pretrained="$PRETRAINED_CKPT_PATH" -- ${rest[@]+"${rest[@]}"}
