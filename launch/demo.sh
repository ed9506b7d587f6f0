#!/usr/bin/env bash
# The whole way on one machine: fetch real data, shard it, train on two processes, evaluate.
# What is there already is kept, so a second call goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -d .venv/bin ]]; then
  PATH=$PWD/.venv/bin:$PATH
fi

# step TITLE COMMAND...: run it, and say how long it took.
step() {
  local title=$1 start=$SECONDS
  shift
  echo
  echo "== $title"
  echo "   $*"
  "$@" || return
  echo "   done in $((SECONDS - start)) s"
}

# make_once TITLE FILE COMMAND...: a step that is left out where FILE, its last output, is there.
make_once() {
  local title=$1 file=$2
  shift 2
  if [[ -e $file ]]; then
    echo
    echo "== $title: $file is there already"
  else
    step "$title" "$@"
  fi
}

# shard NAME CORPUS OPTION...: into data/demo/NAME, which appears only when it is whole.
shard() {
  local out=data/demo/$1 corpus=data/corpora/$2
  shift 2
  rm -rf "$out.tmp"
  mmmoe-data shard "$corpus/manifest.jsonl" --out "$out.tmp" "$@" && mv "$out.tmp" "$out"
}

# setting KEY: its plain value in the chosen config, so that paths are named in one place.
setting() {
  sed -n "s/^ *$1: *\([^ #]*\).*/\1/p" "$config" | head -n 1
}

mkdir -p data/corpora data/demo

make_once "Make the small built-in corpus" data/corpora/mini/manifest.jsonl \
  mmmoe-data corpus mini --out data/corpora/mini
make_once "Shard it" data/demo/mini shard mini mini --image-size 96 --audio-rate 16000

config=configs/demo.yaml
manifests=(data/corpora/mini/manifest.jsonl)
# The step stands in a condition, so its failure does not end the script.
if make_once "Fetch the Tux Paint corpus (pictures, words and voices; 161 MB)" data/corpora/tuxpaint/manifest.jsonl \
  mmmoe-data corpus tuxpaint --out data/corpora/tuxpaint; then
  manifests+=(data/corpora/tuxpaint/manifest.jsonl)
  make_once "Shard the named stamps" data/demo/tuxpaint-named \
    shard tuxpaint-named tuxpaint --filter subset=named --image-size 96
  make_once "Shard the spoken stamps" data/demo/tuxpaint-spoken \
    shard tuxpaint-spoken tuxpaint --filter subset=spoken --image-size 96 --audio-rate 16000
else
  config=configs/demo_mini.yaml
  cat <<'END'

!! The Tux Paint corpus could not be fetched (the messages above say why).
!! The demo goes on with the small built-in corpus alone: it shows that everything runs,
!! and its scores say nothing about learning from real data.
END
fi

tokenizer=$(setting tokenizer)
make_once "Learn a tokenizer" "$tokenizer" \
  mmmoe-data tokenizer "${manifests[@]}" --vocab-size 1024 --out "$tokenizer"

run=runs/$(setting name)
# --resume: goes on from the newest checkpoint, or begins where there is none.
step "Train on two processes" launch/torchrun.sh 2 train "$config" --resume
step "Evaluate" mmmoe evaluate "$run"

echo
echo "The demo took $SECONDS s. Look at:"
find "$run" -maxdepth 2 -type f \( -name '*.md' -o -name '*.png' -o -name '*.html' \) | sort | sed 's/^/  /'
echo "  tensorboard --logdir $run/tensorboard"
