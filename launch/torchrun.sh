#!/usr/bin/env bash
# Run an mmmoe command on N processes of this machine: launch/torchrun.sh N COMMAND [ARGUMENT...]
# More processes than cores is fine; it is slower, and the numbers are the same.
#
# On many machines, start the same command once on each, with these variables:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=HOST [MASTER_PORT=29500] launch/torchrun.sh 8 train CONFIG
# NODE_RANK is 0 on HOST, and 1, 2, ... on the others. They wait JOIN_TIMEOUT seconds (600) for each other, at the
# start and after a failure: a machine that is started again within that time joins, and all resume.
#
# SIGTERM, SIGUSR1 (Slurm: --signal=B:USR1@120) and Ctrl-C: training saves a checkpoint, and this script exits with 75
# (restart it). If a rank crashes, all are restarted and resume from the last checkpoint, MAX_RESTARTS times (3).
# Other exit codes: 0 done, 2 an error that a restart does not fix, 76 a rank hung, 1 any other failure.
set -euo pipefail

{ # bash reads all of it before it runs: the file may be edited meanwhile

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/torchrun.sh N COMMAND [ARGUMENT...], e.g. launch/torchrun.sh 2 train configs/demo.yaml" >&2
  exit 2
fi
processes=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -d $root/mmmoe_pretrain ]] || root=$(dirname "$root") # launch/ lies in the package where that is installed
python=python
if [[ -x $root/.venv/bin/python ]]; then
  python=$root/.venv/bin/python
fi

if [[ $1 == doctor ]]; then
  MAX_RESTARTS=0
fi

# Tensor parallelism on GPUs overlaps with communication only where kernels start in the order of their launch.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Workers get their own store: keys left in a shared one break restarts (pytorch #135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1 # else python -m takes the code of the working folder: of a checkout that mmmoe-launch has copied

# Two files between the script and its workers: a request to stop, and their exit code (mmmoe_pretrain/exit_codes.py).
talk=$(mktemp -d)
trap 'rm -rf "$talk"' EXIT
export MMMOE_STOP_FILE=$talk/stop MMMOE_EXIT_FILE=$talk/exit_code

torchrun=
interrupted=
# shellcheck disable=SC2329 # the traps call it
ask_to_stop() {
  interrupted=yes
  if [[ $1 == SIGINT && -e $MMMOE_STOP_FILE && -n $torchrun ]]; then
    echo "torchrun.sh: interrupted again: ending without saving" >&2 || true
    kill -HUP "$torchrun"
    exit 130
  fi
  echo "$1" >"$MMMOE_STOP_FILE" # first: after a SIGHUP there is no terminal to write to
  echo "torchrun.sh: $1: training saves a checkpoint and ends" >&2 || true
}
for signal in TERM USR1 INT HUP; do
  # shellcheck disable=SC2064 # the name of this signal, now
  trap "ask_to_stop SIG$signal" "$signal"
done

set -m # torchrun gets its own process group: Ctrl-C reaches only this script
(
  # torchrun would end its workers by both, and schedulers may send both to every process.
  trap '' TERM USR1
  exec "$python" -m mmmoe_pretrain.launcher "$processes" "${MAX_RESTARTS:-3}" -m mmmoe_pretrain.cli "$@"
) &
torchrun=$!

status=0
while true; do
  interrupted=
  wait "$torchrun" && status=0 || status=$?
  [[ -z $interrupted ]] || continue # the status may be the signal's; bash keeps torchrun's for the next wait
  kill -0 "$torchrun" 2>/dev/null || break
  sleep 1 # it is stopped (SIGSTOP), and may go on
done

reason=$(cat "$MMMOE_EXIT_FILE" 2>/dev/null || true)
case $status:$reason in
  # stopped after saving; an error that ended restarted workers; failed checks of mmmoe doctor
  0:75 | 0:2 | 0:1) status=$reason ;;
  0:*) ;;
  *:2) status=2 ;;
  75:*) ;; # asked to stop while it waited for the other machines
  *:76) status=76 ;;
esac
if ((status > 128)); then
  echo "torchrun.sh: torchrun was killed (exit code $status); was the machine out of memory?" >&2 || true
  status=1
fi
exit "$status"
}
