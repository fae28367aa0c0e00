#!/usr/bin/env bash
# Inception v3, ImageNet, 8 devices, 240 epochs. Reported: Acc@1 78.12, 6823 images/s (NPU, torch 1.8, O2).
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py recipe=full_8p devices=8 -- -- "$@"
