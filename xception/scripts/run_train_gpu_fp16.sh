#!/usr/bin/env bash
# Xception on DEVICE_NUM GPUs in fp16, batch 64 each. Reported on 8 (precision not stated): top-1 79.8, 282 ms a step.
#   sh run_train_gpu_fp16.sh DEVICE_NUM DATASET_PATH [PRETRAINED_CKPT_PATH] [--key=value ...] [-- options of train.py]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
positional DEVICE_NUM DATASET_PATH "[PRETRAINED_CKPT_PATH]" -- "$@"
launch xception/train.py devices="$DEVICE_NUM" device=cuda data_path="$DATASET_PATH" \
  -- --recipe=GPU --pretrained="$PRETRAINED_CKPT_PATH" -- ${rest[@]+"${rest[@]}"}
