#!/usr/bin/env bash
# Run an mmmoe command on N processes of this machine: launch/torchrun.sh N COMMAND [ARGUMENT...]
# More processes than cores is fine; it is slower, and the numbers are the same.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/torchrun.sh N COMMAND [ARGUMENT...], e.g. launch/torchrun.sh 2 train configs/demo.yaml" >&2
  exit 2
fi
processes=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
if [[ -x $root/.venv/bin/python ]]; then
  python=$root/.venv/bin/python
fi

# Tensor parallelism on GPUs overlaps with communication only where kernels start in the order of their launch.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Workers get a store of their own: keys left in a shared one break restarts (pytorch #135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# exec: signals reach torchrun itself, and it hands them on to the workers.
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
  -m mmmoe_pretrain.cli "$@"
