#!/usr/bin/env bash
# Accuracy of an Xception checkpoint on the images of DATA_DIR (GPU); also in eval_gpu.log.
#   sh run_eval_gpu.sh DEVICE_ID DATA_DIR PATH_CHECKPOINT [--key=value ...] [-- options of eval.py]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
positional DEVICE_ID DATA_DIR PATH_CHECKPOINT -- "$@"
run xception/eval.py --device_target=GPU --device_id="$DEVICE_ID" --dataset_path="$DATA_DIR" \
  --checkpoint_path="$PATH_CHECKPOINT" --log_file=eval_gpu.log ${rest[@]+"${rest[@]}"}
