#!/usr/bin/env bash
# Accuracy of an Xception checkpoint on the images of DATA_DIR (Ascend); also in eval.log.
#   sh run_eval.sh DEVICE_ID DATA_DIR PATH_CHECKPOINT [--key=value ...] [-- options of eval.py]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
positional DEVICE_ID DATA_DIR PATH_CHECKPOINT -- "$@"
run xception/eval.py --device_target=Ascend --device_id="$DEVICE_ID" --dataset_path="$DATA_DIR" \
  --checkpoint_path="$PATH_CHECKPOINT" --log_file=eval.log ${rest[@]+"${rest[@]}"}
