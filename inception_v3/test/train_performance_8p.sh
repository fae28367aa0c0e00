#!/usr/bin/env bash
# Inception v3, ImageNet, 8 devices, the speed of one epoch. Reported: 6823 images/s (NPU, torch 1.8, O2).
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py devices=8 batch_size=2048 epochs=1 lr=0.045 \
  -- --wd=1e-4 --label-smoothing=0.1 --amp --loss-scale=128 --seed=49 -j 128 --print-freq=30 -- "$@"
