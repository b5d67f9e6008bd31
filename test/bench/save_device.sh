#!/bin/bash
# Saving on a GPU, through the command line: how long training waits, how long a checkpoint takes, what the disk can do, resume and export.
#
#   bash test/bench/save_device.sh JOB [FOLDER] [STEPS]      RANKC="./rankc" for a packed command line
#
# JOB is a job for one rank (test/bench/jobs). FOLDER needs room for three checkpoints. Prints one line per figure; the logs stay in FOLDER.
# Prediction to compare with: save_stall_seconds = bytes / 50 GB/s from the second checkpoint on (the first may wait for pinned memory);
# save_seconds = bytes / min(disk, 0.7 GB/s x writer threads).
set -euo pipefail
job=${1:?a job} at=${2:-/tmp/rankc-save} steps=${3:-24}
rankc=${RANKC:-node --import tsx/esm src/cli/main.ts}
mkdir -p "$at"; rm -rf "$at/checkpoints" "$at/model"
peak() { python3 -c 'import resource,subprocess,sys; r=subprocess.run(sys.argv[2:]).returncode; print("peak host memory of", sys.argv[1]+":", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss//1024, "MiB", file=sys.stderr); sys.exit(r)' "$@"; }
$rankc compile "$job" --target cuda:sm_90a -o "$at/plan" > "$at/compile.log" 2>&1
run() { peak "$1" $rankc run "$at/plan" --backend cuda --data-dir "$(dirname "$job")" --save "$at/checkpoints" --save-every 6 --keep 2 "${@:2}"; }

echo "== $job: $steps steps, a checkpoint every 6"
run "the run" --steps "$steps" --metrics "$at/metrics.jsonl" > "$at/run.log" 2>&1; grep -E "saved|peak" "$at/run.log"
python3 - "$at/metrics.jsonl" <<'P'
import json, statistics, sys
lines = [json.loads(l) for l in open(sys.argv[1])]
plain = [l["seconds"] for l in lines[2:] if "save_stall_seconds" not in l]
print("stalls [s]:", [round(l["save_stall_seconds"], 3) for l in lines if "save_stall_seconds" in l])
print("save seconds:", [round(l["save_seconds"], 2) for l in lines if "save_seconds" in l])
print("median step [s]:", round(statistics.median(plain), 4), " slowest:", round(max(plain), 4))
P
bytes=$(du -sb "$at"/checkpoints/step-* | tail -1 | cut -f1); echo "bytes of a checkpoint: $bytes"
dd if=/dev/zero of="$at/dd" bs=64M count=$((bytes / 67108864 > 200 ? 200 : bytes / 67108864 + 1)) conv=fsync 2>&1 | tail -1; rm -f "$at/dd"

echo "== SIGTERM, then --resume auto"
$rankc run "$at/plan" --backend cuda --data-dir "$(dirname "$job")" --save "$at/checkpoints" --keep 2 --steps 100000 --resume auto > "$at/term.log" 2>&1 &
pid=$!
until grep -q "step " "$at/term.log"; do sleep 0.2; done
sleep 2; begun=$(date +%s.%N); kill -TERM $pid; wait $pid || echo "exit code $? (143: SIGTERM)"
echo "from SIGTERM to the end: $(echo "$(date +%s.%N) - $begun" | bc) s"; grep -E "saved|interrupted" "$at/term.log" | tail -2
begun=$(date +%s.%N); run "the resumed run" --resume auto --time-limit 60s --steps 100000 > "$at/resume.log" 2>&1 || echo "exit code $? (124: the time limit)"
grep -E "resumed|peak" "$at/resume.log"; echo "resumed run with --time-limit 60s: $(echo "$(date +%s.%N) - $begun" | bc) s"

echo "== export"
begun=$(date +%s.%N); peak "the export" $rankc export hf "$at/checkpoints" -o "$at/model" 2>&1 | tail -2; echo "export: $(echo "$(date +%s.%N) - $begun" | bc) s, $(du -sb "$at/model" | cut -f1) bytes"
