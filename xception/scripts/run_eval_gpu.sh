#!/usr/bin/env bash
# Accuracy of a checkpoint on a GPU, also in eval_gpu.log: DEVICE_ID DATA_DIR PATH_CHECKPOINT [-- options of eval.py]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started with sh
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
run xception/eval.py --device_target=GPU --device_id=@DEVICE_ID --dataset_path=@DATA_DIR --checkpoint_path=@PATH_CHECKPOINT --log_file=eval_gpu.log -- "$@"
