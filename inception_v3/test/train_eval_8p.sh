#!/usr/bin/env bash
# Evaluate a checkpoint of Inception v3 on 8 devices; --resume=FILE names it. Every image counts once.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py recipe=full_8p devices=8 -- --evaluate -- "$@"
