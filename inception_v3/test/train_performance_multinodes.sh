#!/usr/bin/env bash
# Inception v3, ImageNet, several machines with 8 devices each, the speed of one epoch. Start it on every machine with
# --nnodes=N --node_rank=R --local_addr=ADDRESS --master_addr=ADDRESS; --batch_size counts the images of one machine.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/launch.sh"
launch inception_v3/train.py devices=8 batch_size=2048 epochs=1 lr=0.045 \
  -- --wd=1e-4 --label-smoothing=0.1 --amp --loss-scale=128 --seed=49 -j 128 --print-freq=30 -- "$@"
