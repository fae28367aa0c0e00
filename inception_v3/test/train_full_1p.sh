#!/usr/bin/env bash
# Inception v3, ImageNet, one device, 240 epochs. Reported: 942 images/s (NPU, torch 1.8, O2).
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py devices=1 batch_size=256 epochs=240 lr=0.045 \
  -- --wd=2e-4 --label-smoothing=0.1 --amp --loss-scale=1024 -j 32 --print-freq=100 -- "$@"
