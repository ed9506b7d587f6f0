#!/usr/bin/env bash
# The demo on one machine: fetch real data, shard it, train on two processes, evaluate.
# Steps whose output exists are skipped, so a second call continues where the first one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/steps.sh
source launch/steps.sh
export CUDA_VISIBLE_DEVICES= # sized for two CPU cores; always runs on CPUs

launch/data.sh

config=configs/demo.yaml
if [[ ! -e $(setting tokenizer "$config") ]]; then
  config=configs/demo_mini.yaml
fi
run=runs/$(setting name "$config")
# It resumes from the newest checkpoint, if there is one.
step "Train on two processes" launch/torchrun.sh 2 train "$config"
step "Evaluate" mmmoe evaluate "$run"

echo
echo "The demo took $SECONDS s. See:"
find "$run" -maxdepth 1 -type f \( -name '*.md' -o -name '*.png' \) | sort | sed 's/^/  /'
echo "  .venv/bin/tensorboard --logdir $run/tensorboard"
if [[ $config == configs/demo_mini.yaml ]]; then
  cat <<'END'

!! This was only the small corpus of the repository, since Tux Paint could not be fetched. It shows that
!! everything runs; its scores say little about learning from real data.
END
fi
