#!/usr/bin/env bash
# A Ray cluster for the time of a Slurm job, and a run on it. From the repository's root, where .venv is:
#
#   sbatch --nodes=4 --time=12:00:00 docker/slurm.sh +experiment=quickstart islands=4 checkpoint.every=1
#
# What follows is given to `diloco train`, and resume=auto, so that a job that is started again goes on. Five minutes
# before the time is over the run writes a checkpoint and the job puts itself in the queue again.
# `scancel --batch --signal=TERM JOB` ends it with a checkpoint, `scancel JOB` at once.
# The folder must be one that all nodes see. Without Ray: runtime=spmd, see README.md.
#SBATCH --job-name=diloco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

if [ -z "${SLURM_JOB_NODELIST-}" ]; then # --help, or started without sbatch
    sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' "$0"
    case "${1-}" in -h | --help) exit 0 ;; *) exit 2 ;; esac
fi

cd "${SLURM_SUBMIT_DIR:-$PWD}"
if [ -d .venv ]; then PATH=$PWD/.venv/bin:$PATH; fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
one=(srun --nodes=1 --ntasks=1 --overlap --nodelist="${hosts[0]}")
address=${HEAD_ADDRESS:-$("${one[@]}" hostname -I | cut -d ' ' -f 1)} # HEAD_ADDRESS: of another network
started=() # of srun; the head's is the first

# What Slurm says: USR1 = the time is nearly over, TERM = the job is to end.
run="" again=""
# shellcheck disable=SC2329 # a trap calls it
stop() {
    if [ -z "$run" ]; then echo "slurm.sh: told to end before the run began" >&2 && exit 1; fi
    kill -TERM "$run" 2>/dev/null || true # it writes a checkpoint
}
trap 'again=yes; stop' USR1
trap stop TERM

# One token for this job, which its owner alone can read.
token=$PWD/runs/.token-$SLURM_JOB_ID
mkdir -p runs
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token

# shellcheck disable=SC2329 # a trap calls it
clean() {
    trap '' TERM USR1
    rm -f "$token"
    local number # srun ends its tasks at once, without notice: the run is over
    for ((number = ${#started[@]} - 1; number >= 0; number--)); do # workers first
        kill -TERM "${started[$number]}" 2>/dev/null || true
        wait "${started[$number]}" || true
    done
}
trap clean EXIT

cpus=${SLURM_CPUS_ON_NODE:-1}
head=$address:${HEAD_PORT:-6379}
NODE_DRAIN_S=${NODE_DRAIN_S:-20}
export NODE_DRAIN_S
# shellcheck disable=SC2086 # several options in one variable
"${one[@]}" docker/node.sh head --node-ip-address="$address" --port="${head##*:}" --num-cpus="$cpus" \
    ${NODE_OPTIONS:-} &
started+=($!)
for ((tries = 0; ; tries++)); do
    if ray health-check --address="$head" 2>/dev/null; then break; fi
    if [ "$tries" -ge 60 ] || ! kill -0 "${started[0]}"; then echo "slurm.sh: the head did not start" >&2 && exit 1; fi
    sleep 2
done
if [ "${#hosts[@]}" -gt 1 ]; then
    others=$((${#hosts[@]} - 1))
    # shellcheck disable=SC2086
    HEAD=$head srun --nodes="$others" --ntasks="$others" --overlap --exclude="${hosts[0]}" \
        docker/node.sh worker --num-cpus="$cpus" ${NODE_OPTIONS:-} &
    started+=($!)
fi
# The run wants places for its islands: all nodes first.
python - "$head" "${#hosts[@]}" <<'PYTHON'
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
deadline_s = time.monotonic() + 120
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]) and time.monotonic() < deadline_s:
    time.sleep(1)
PYTHON

RAY_ADDRESS=$head diloco train resume=auto "$@" &
run=$!
status=0
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do # a signal ended the waiting, not the run
    status=0
    wait "$run" || status=$?
done
if [ -n "$again" ] && [ "$status" -eq 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
