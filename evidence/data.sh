#!/usr/bin/env bash
# Corpora of the studies: evidence/data.sh emoji|europe|gcide|demo, or mini FOLDER, which needs no network. Fetches, shards
# and tokenizes; what exists is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/steps.sh
source launch/steps.sh

# shard CORPUS OUT OPTION...: into OUT, which exists only when it is complete; a second call resumes.
shard() {
  local manifest=$1/manifest.jsonl out=$2
  shift 2
  show mmmoe-data shard "$manifest" --out "$out.tmp" --overwrite "$@" && mv "$out.tmp" "$out"
}

# tokenizer CORPUS SIZE OUT OPTION...
tokenizer() {
  make_once "Train a tokenizer" "$3" mmmoe-data tokenizer "$1/manifest.jsonl" --vocab-size "$2" --out "$3" "${@:4}"
}

# words SHARDS OUT OPTION...: vectors of words
words() {
  make_once "Train word vectors" "$2" mmmoe-data words "$1" --out "$2" "${@:3}"
}

case "${1:-} ${2:-}" in
  "emoji " | "europe ")
    corpus=data/corpora/cldr-emoji out=data/evidence/$1 tokens=data/evidence/emoji/tokens.model
    rows=(--filter subset=noto)
    if [[ $1 == europe ]]; then
      for language in da de en es fr it nl no pl pt ro sv; do rows+=(--filter "language=$language"); done
    fi
    mkdir -p data/corpora "$out" "${tokens%/*}"
    make_once "Fetch emoji and their names" "$corpus/manifest.jsonl" mmmoe-data corpus cldr-emoji --out "$corpus"
    make_once "Shard one style" "$out/shards" shard "$corpus" "$out/shards" "${rows[@]}" --image-size 48
    tokenizer "$corpus" 2048 "$tokens" --character-coverage 0.98
    if [[ $1 == europe ]]; then words "$out/shards" "$out/words.npz"; fi
    ;;
  "gcide ")
    corpus=data/corpora/gcide out=data/evidence/gcide
    mkdir -p data/corpora "$out"
    make_once "Fetch a dictionary" "$corpus/manifest.jsonl" mmmoe-data corpus gcide --out "$corpus"
    make_once "Shard its entries" "$out/shards" shard "$corpus" "$out/shards"
    tokenizer "$corpus" 512 "$out/tokens.model"
    ;;
  "demo ")
    launch/data.sh
    if [[ ! -e data/demo/tuxpaint-spoken ]]; then
      echo "the study of the demo needs the Tux Paint corpus, which could not be fetched (see above)" >&2
      exit 1
    fi
    step "Read the languages of the spoken stamps" mmmoe-data index configs/methods/sampling_temperature.yaml
    ;;
  "mini "?*)
    corpus=$2/mini out=$2
    mkdir -p "$out"
    make_once "Unpack the small corpus of the repository" "$corpus/manifest.jsonl" \
      mmmoe-data corpus mini --out "$corpus"
    make_once "Shard the rows that have all modalities" "$out/shards" \
      shard "$corpus" "$out/shards" --filter subset=constructed --image-size 16 --workers 1
    tokenizer "$corpus" 400 "$out/tokens.model"
    words "$out/shards" "$out/words.npz" --dimension 8 --min-count 1
    ;;
  *)
    echo "usage: evidence/data.sh emoji|europe|gcide|demo, or evidence/data.sh mini FOLDER" >&2
    exit 2
    ;;
esac
