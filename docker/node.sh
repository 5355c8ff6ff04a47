#!/usr/bin/env bash
# One Ray node in the foreground, on fixed ports.
#
#   node.sh head   [more options of ray start]
#   node.sh worker [more options of ray start]     with HEAD=host[:port] of the head
#
# SIGTERM (a spot notice, docker stop, Slurm before it ends a job) makes a worker leave in order: the cluster is told
# that it goes, the run has NODE_DRAIN_S seconds to take its island away, and then this node's own processes end. Other
# nodes on the machine are not touched, as `ray stop` would.
set -euo pipefail

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    cat <<'TEXT'
environment:
  HEAD           where the head is, for a worker: host or host:port (port 6379)
  NODE_IP        the address that the others reach this node by; default: what Ray finds. Needed on a VPN
  NODE_PORTS     first of this node's fixed ports (6380): six for Ray, and 200 for processes from 20 further on
  NODE_DRAIN_S   seconds between the notice and the end (30); less than what the machine gives
  RAY_AUTH_MODE  token, unless set: the token is in RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN or ~/.ray/auth_token
TEXT
}

case ${1:-} in
    head | worker) role=$1 && shift ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
esac

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-120} # Ray's 3 are too few to write a checkpoint in
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0                   # Ray's own notice at its end: it was given by then
: "${NODE_PORTS:=6380}" "${NODE_DRAIN_S:=30}"
for number in "$NODE_PORTS" "$NODE_DRAIN_S"; do
    [[ $number =~ ^[0-9]+$ ]] && continue
    echo "node.sh: NODE_PORTS and NODE_DRAIN_S must be whole numbers, not $number" >&2 && exit 2
done
ulimit -n 65536 2>/dev/null || true # Ray has many files open

options=(
    --node-manager-port="$NODE_PORTS"
    --object-manager-port="$((NODE_PORTS + 1))"
    --runtime-env-agent-port="$((NODE_PORTS + 2))"
    --dashboard-agent-grpc-port="$((NODE_PORTS + 3))"
    --dashboard-agent-listen-port="$((NODE_PORTS + 4))"
    --metrics-export-port="$((NODE_PORTS + 5))"
    --min-worker-port="$((NODE_PORTS + 20))"
    --max-worker-port="$((NODE_PORTS + 219))"
    --disable-usage-stats
)
if [ -n "${NODE_IP:-}" ]; then options+=(--node-ip-address="$NODE_IP"); fi
if [ "$role" = head ]; then
    options+=(--head --port=6379 --dashboard-host=127.0.0.1)
else
    [ -n "${HEAD:-}" ] || { echo "node.sh: a worker needs HEAD=host[:port], where the head is" >&2 && exit 2; }
    [[ $HEAD == *:* ]] || HEAD=$HEAD:6379
    options+=(--address="$HEAD")
fi

# The number that the cluster knows this node by: an argument of the raylet that our `ray start` started.
node_id() {
    local status
    grep -slx "PPid:[[:space:]]*$ray" /proc/[0-9]*/status | while read -r status; do
        tr '\0' '\n' <"${status%status}cmdline" 2>/dev/null | sed -n 's/^--node_id=//p'
    done
}

alive() { kill -0 "$ray" 2>/dev/null; }

leave() {
    trap '' TERM INT
    ray=${ray:-${!:-}} # it may just have been started
    [ -n "$ray" ] || exit 0
    local end=$((SECONDS + NODE_DRAIN_S)) id
    id=$(node_id || true)
    if [ "$role" = worker ] && [ -n "$id" ] && [ "$NODE_DRAIN_S" -gt 0 ]; then
        echo "node.sh: telling the cluster that this node leaves in $NODE_DRAIN_S s"
        timeout "$NODE_DRAIN_S" ray drain-node --address="$HEAD" --node-id="$id" \
            --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message="the node was told to stop" \
            --deadline-remaining-seconds="$NODE_DRAIN_S" >/dev/null 2>&1 || echo "node.sh: the head does not answer" >&2
        while alive && [ "$SECONDS" -lt "$end" ]; do sleep 0.5; done # Ray ends by itself once nothing runs here
    fi
    if alive; then kill -TERM "$ray"; fi
    wait "$ray" || true
    exit 0
}

ray=""
trap leave TERM INT
ray start --block "${options[@]}" "$@" &
ray=$!
wait "$ray"
