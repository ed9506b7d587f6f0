#!/usr/bin/env bash
# The example from data to scores, about five minutes on one core: examples/medical/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ! -d .venv/bin ]] || PATH=$PWD/.venv/bin:$PATH
data=data/phantoms
[[ -e $data/manifest.jsonl ]] || python examples/medical/phantoms.py --out $data
[[ -e $data/tokens.model ]] || mmmoe-data tokenizer $data/manifest.jsonl --vocab-size 300 --out $data/tokens.model
mmmoe train examples/medical/config.yaml
mmmoe evaluate runs/medical
for view in front side; do
  mmmoe evaluate runs/medical --test $data/test_$view --out runs/medical/$view
done
