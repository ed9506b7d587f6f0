#!/usr/bin/env bash
# Corpora of the studies: evidence/data.sh emoji|europe|unseen|domains|lifelong|gcide|demo|stamps, or mini FOLDER, which
# needs no network. Fetches, shards and tokenizes; what exists is kept.
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

# codes SHARDS MODALITY OUT OPTION...: a discrete tokenizer of images or audio; more shards may follow
codes() {
  make_once "Train a tokenizer of codes" "$3" mmmoe-data codes "$1" --modality "$2" --out "$3" "${@:4}"
}

# some SHARDS OUT OPTION...: a part of the shards, without decoding
some() {
  local shards=$1 out=$2
  shift 2
  show mmmoe-data reshard "$shards" --out "$out.tmp" --overwrite "$@" && mv "$out.tmp" "$out"
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
    if [[ $1 == europe ]]; then
      words "$out/shards" "$out/words.npz"
      codes "$out/shards" image "$out/codes.npz" --setting size=48
    fi
    ;;
  "unseen ") # an eighth of the emoji, those whose code ends in 3 or 7, is in no training sample, in any language
    "$0" europe
    from=data/evidence/europe/shards out=data/evidence/unseen
    mkdir -p "$out"
    grep -oE 'cldr-noto-[^"]+' data/corpora/cldr-emoji/manifest.jsonl | sort -u > "$out/all.txt"
    grep -E '^cldr-noto-[0-9a-f]*[37]-' "$out/all.txt" > "$out/unseen.txt"
    grep -vE '^cldr-noto-[0-9a-f]*[37]-' "$out/all.txt" > "$out/seen.txt"
    make_once "Shards of the emoji that are trained on" "$out/seen" some "$from" "$out/seen" --keys "$out/seen.txt"
    make_once "Shards of the others" "$out/held_out" some "$from" "$out/held_out" --keys "$out/unseen.txt"
    codes "$out/seen/train" image "$out/codes.npz" "$out/held_out/test" --setting size=48
    ;;
  "lifelong ") # names in four groups of languages, and 256 samples of each to replay
    "$0" europe
    from=data/evidence/europe/shards/train out=data/evidence/lifelong stage=0
    mkdir -p "$out"
    for group in "da no sv" "de en nl" "es it pt" "fr pl ro"; do
      stage=$((stage + 1)) rows=()
      for language in $group; do rows+=(--filter "language=$language"); done
      make_once "Shards of $group" "$out/stage-$stage" some "$from" "$out/stage-$stage" "${rows[@]}"
      make_once "Take 256 of them" "$out/memory-$stage" some "$out/stage-$stage" "$out/memory-$stage" --samples 256
    done
    ;;
  "domains ") # a second style of drawing: to train on without names, and held out with them
    "$0" europe
    corpus=data/corpora/cldr-emoji out=data/evidence/domains
    mkdir -p "$out/nameless"
    ln -sfn "$PWD/$corpus/files" "$out/nameless/files"
    grep '"subset": "fluent"' "$corpus/manifest.jsonl" | grep '"language": "en"' \
      | sed -E 's/"text": "([^"\\]|\\.)*"/"text": null/; s/"split": "[a-z]*"/"split": "train"/' > "$out/nameless/manifest.jsonl"
    make_once "Shard images of another style" "$out/images" shard "$out/nameless" "$out/images" --image-size 48
    rows=(--filter subset=fluent --filter split=test)
    for language in da de en es fr it nl no pl pt ro sv; do rows+=(--filter "language=$language"); done
    make_once "Shard their held-out names" "$out/named" shard "$corpus" "$out/named" "${rows[@]}" --image-size 48
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
    codes data/demo/tuxpaint-spoken audio data/demo/speech_codes.npz
    ;;
  "stamps ") # the demo's, many names without speech, and parts of the recordings
    "$0" demo
    out=data/evidence/stamps
    mkdir -p "$out"
    make_once "Shard the translated names" "$out/named" \
      shard data/corpora/tuxpaint "$out/named" --filter subset=translated --filter split=train --image-size 96
    for samples in 430 43; do
      make_once "Take $samples recordings" "$out/spoken-$samples" \
        some data/demo/tuxpaint-spoken/train "$out/spoken-$samples" --samples "$samples"
    done
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
    codes "$out/shards" image "$out/image_codes.npz" --setting size=16 --levels 4,3 --width 8 --steps 20
    codes "$out/shards" audio "$out/speech_codes.npz" --setting max_seconds=1 --levels 4,3 --width 8 --steps 20
    ;;
  *)
    echo "usage: evidence/data.sh emoji|europe|unseen|domains|lifelong|gcide|demo|stamps, or evidence/data.sh mini FOLDER" >&2
    exit 2
    ;;
esac
