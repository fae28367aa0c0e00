#!/usr/bin/env bash
# Inception v3, ImageNet, 8 devices, speed of one epoch. Reported: 6823 images/s (NPU, torch 1.8, O2).
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py recipe=performance_8p devices=8 -- -- "$@"
