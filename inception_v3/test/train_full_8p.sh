#!/usr/bin/env bash
# Inception v3, ImageNet, 8 devices, 240 epochs. Reported: Acc@1 78.12, 6823 images/s (NPU, torch 1.8, O2).
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py devices=8 batch_size=2048 epochs=240 lr=1.2 \
  -- --wd=1e-4 --label-smoothing=0.1 --amp --loss-scale=128 --seed=49 -j 128 --print-freq=30 -- "$@"
