#!/usr/bin/env bash
# The data of the demo: fetch real corpora, shard them, train a tokenizer. Steps whose output exists are skipped.
# If Tux Paint cannot be fetched, the script warns and uses only the small corpus of this repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/steps.sh
source launch/steps.sh

# shard NAME CORPUS OPTION...: into data/demo/NAME, which exists only when it is complete; a second call resumes.
shard() {
  local out=data/demo/$1 corpus=data/corpora/$2
  shift 2
  show mmmoe-data shard "$corpus/manifest.jsonl" --out "$out.tmp" --samples-per-shard 1000 --overwrite "$@" && mv "$out.tmp" "$out"
}

mkdir -p data/corpora data/demo

make_once "Unpack the small corpus of the repository" data/corpora/mini/manifest.jsonl \
  mmmoe-data corpus mini --out data/corpora/mini
make_once "Shard the small corpus" data/demo/mini shard mini mini --image-size 96 --audio-rate 16000

config=configs/demo.yaml
manifests=(data/corpora/mini/manifest.jsonl)
# In a condition, so that its failure does not end the script.
if make_once "Fetch the Tux Paint corpus (images, names and speech; 161 MB)" data/corpora/tuxpaint/manifest.jsonl \
  mmmoe-data corpus tuxpaint --out data/corpora/tuxpaint; then
  manifests+=(data/corpora/tuxpaint/manifest.jsonl)
  make_once "Shard the named stamps" data/demo/tuxpaint-named \
    shard tuxpaint-named tuxpaint --filter subset=named --image-size 96
  make_once "Shard the spoken stamps" data/demo/tuxpaint-spoken \
    shard tuxpaint-spoken tuxpaint --filter subset=spoken --image-size 96 --audio-rate 16000
else
  config=configs/demo_mini.yaml
  echo
  echo "!! The Tux Paint corpus could not be fetched (see the messages above)."
fi

tokenizer=$(setting tokenizer "$config")
make_once "Train a tokenizer" "$tokenizer" \
  mmmoe-data tokenizer "${manifests[@]}" --vocab-size 1024 --out "$tokenizer"
