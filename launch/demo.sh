#!/usr/bin/env bash
# The whole way on one machine: fetch real data, shard it, train on two processes, evaluate.
# What is there already is kept, so a second call goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/steps.sh
source launch/steps.sh
export CUDA_VISIBLE_DEVICES= # sized for two CPU cores, and run on them everywhere

launch/data.sh

config=configs/demo.yaml
if [[ ! -e $(setting tokenizer "$config") ]]; then
  config=configs/demo_mini.yaml
fi
run=runs/$(setting name "$config")
# It goes on from the newest checkpoint, or begins where there is none.
step "Train on two processes" launch/torchrun.sh 2 train "$config"
step "Evaluate" mmmoe evaluate "$run" --dense-results docs/results.json

echo
echo "The demo took $SECONDS s. Look at:"
find "$run" -maxdepth 1 -type f \( -name '*.md' -o -name '*.png' \) | sort | sed 's/^/  /'
echo "  tensorboard --logdir $run/tensorboard"
if [[ $config == configs/demo_mini.yaml ]]; then
  cat <<'END'

!! This was the small corpus of the repository alone, since Tux Paint could not be fetched. It shows that
!! everything runs; its scores say little about learning from real data.
END
fi
