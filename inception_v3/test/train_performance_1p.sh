#!/usr/bin/env bash
# Inception v3, ImageNet, one device, speed of one epoch. Reported: 942 images/s (NPU, torch 1.8, O2).
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py recipe=performance_1p devices=1 -- -- "$@"
