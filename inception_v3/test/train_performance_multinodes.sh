#!/usr/bin/env bash
# Inception v3, several machines of 8 devices; on each: --nnodes=N --node_rank=R --local_addr=IP --master_addr=IP.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py recipe=performance_8p devices=8 -- -- "$@"
