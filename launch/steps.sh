# shellcheck shell=bash
# Sourced by the scripts beside it: the environment, and steps that print their title and duration.

if [[ -d .venv/bin ]]; then
  PATH=$PWD/.venv/bin:$PATH
fi
# Ctrl-C ends the script, not just the command that runs.
trap 'exit 130' INT
trap 'exit 143' TERM

# show COMMAND...: print it as it can be typed, then run it.
show() {
  local line
  printf -v line '%q ' "$@"
  echo "   ${line% }"
  "$@"
}

# step TITLE COMMAND...: show it, and print its duration. A function shows the commands that it runs itself.
step() {
  local title=$1 start=$SECONDS
  shift
  echo
  echo "== $title"
  if [[ $(type -t "$1") == function ]]; then
    "$@" || return
  else
    show "$@" || return
  fi
  echo "   done in $((SECONDS - start)) s"
}

# make_once TITLE FILE COMMAND...: a step that is skipped if FILE, its last output, exists.
make_once() {
  local title=$1 file=$2
  shift 2
  if [[ -e $file ]]; then
    echo
    echo "== $title: $file exists, skipped"
  else
    step "$title" "$@"
  fi
}

# setting KEY CONFIG: a plain value of a config, so that paths are named in one place.
setting() {
  sed -n "s/^ *$1: *\([^ #]*\).*/\1/p" "$2" | head -n 1
}
