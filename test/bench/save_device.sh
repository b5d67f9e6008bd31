#!/bin/bash
# Start, save, resume and export of a job on one GPU through the command line, beside what the disk can do. Prints one table.
#
#   bash test/bench/save_device.sh [JOB] [FOLDER] [SAVE_EVERY]
#
# JOB: a job of one rank (default: test/bench/llama-1.1b.yaml). FOLDER: room for three checkpoints (default: /tmp/rankc-save); the logs
# stay there. SAVE_EVERY: steps between two saves, which take longer than a save (default: 150); the run has twice as many.
# RANKC: the command (default: NODE dist/cli/rankc.cjs, with NODE from the environment or `node`). Needs python3, and root to drop caches.
# SHORT=1: the start and one save alone, after SAVE_EVERY steps; with EXPORT=1 the export, too.
# FILL=1: another process holds the memory of the GPU that the steps leave free, so that saves have no staging area (needs torch).
#
# Prediction for llama-1.1b on an H200 (13.2 GB a checkpoint, 0.108 s a step, a disk of 0.96 GB/s written and 1.46 GB/s read by dd, 16 cores),
# made before the run; 125 s in all:
#   time to the first step       2.5 s with NVRTC (plan 0.3, device 0.6, kernels 1.4, weights 0.0, first step 0.1)
#   first stall                  0.06 s: previous 0; memory 0.03 (a staging area of 13.2 GB by cuMemAlloc); copy 0.03, of which 7 ms are the
#                                copy of 13.2 GB at 2 TB/s and the rest the issue of 1,000 copies and the folder
#   second stall                 0.03 s: the memory is there
#   save seconds                 13.8 to 15: 13.2 GB / 0.96 GB/s, as each block is flushed when it is written; before: 24.6 with the stall
#   a step while a save runs     within 2 % of the median: 13.2 GB cross PCIe in bursts of 32 MiB
#   --resume, cold, "weights"    9 s: the disk; warm 2 s: 8 readers at 1.5 GB/s of SHA-256, and 13.2 GB at 10 GB/s; before: 69.5 s
#   export hf, bf16, warm        see test/results: 34 s before; threads for tensors divide it by the number of writers
#   peak host memory             620 MB beside 512 MiB of page-locked blocks of saves; 128 MiB of them in a resumed run
#   FILL=1: stalls               memory 8 to 11 s (page-locking 13.2 GB at 1.2 to 1.7 GB/s, less what 149 steps prepared), copy 0.27 s
set -euo pipefail
short=${SHORT:-} steps_of=2; [ -n "$short" ] && steps_of=1
job=${1:-test/bench/llama-1.1b.yaml} at=${2:-/tmp/rankc-save} every=${3:-150}
rankc=${RANKC:-${NODE:-node} dist/cli/rankc.cjs}
mkdir -p "$at"; rm -rf "$at"/{checkpoints,model,plan,metrics.jsonl,resume-*.jsonl,figures}
cp "$job" "$at/job.yaml"
head -c 3000000 /dev/urandom | base64 > "$at/corpus.txt"
figure() { echo "$1=$2" >> "$at/figures"; }
drop() { sync; echo 3 > /proc/sys/vm/drop_caches 2>/dev/null || echo "no right to drop caches: cold figures are warm"; }
now() { date +%s.%N; }
# runs a command; writes its wall seconds, and the peak of its resident memory by kind
watched() {
  python3 - "$at/figures" "$@" <<'P'
import subprocess, sys, time
figures, name, *command = sys.argv[1:]
begun = time.time()
process = subprocess.Popen(command)
peak = {}
while process.poll() is None:
    try:
        status = dict(l.split(":", 1) for l in open(f"/proc/{process.pid}/status") if ":" in l)
        now = {k: int(status[k].split()[0]) // 1024 for k in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmLck", "VmPin") if k in status}
        # a process that ends has no memory any more
        if now.get("VmRSS", 0) >= peak.get("VmRSS", 0): peak = now
    except (OSError, KeyError, ValueError): pass
    time.sleep(0.05)
with open(figures, "a") as out:
    out.write(f"{name} seconds={time.time() - begun:.1f}\n{name} peak host memory [MiB]={peak}\n")
sys.exit(process.returncode)
P
}
$rankc compile "$at/job.yaml" --target cuda:sm_90a -o "$at/plan" > "$at/compile.log" 2>&1
run() { watched "$1" $rankc run "$at/plan" --backend cuda --data-dir "$at" "${@:2}"; }

if [ -n "${FILL:-}" ]; then
  python3 -c 'import torch,time
free, _ = torch.cuda.mem_get_info(); held = torch.empty(int(free - float("'"${FILL_LEAVES:-32e9}"'")), dtype=torch.uint8, device="cuda"); print("held", held.numel()); time.sleep(600)' &
  holder=$!; trap 'kill $holder 2>/dev/null' EXIT; sleep 8
fi
if [ -z "$short" ]; then
  dd if=/dev/zero of="$at/dd" bs=64M count=100 conv=fsync 2> "$at/dd.log"; rm -f "$at/dd"
  figure "dd write, 6.7 GB" "$(tail -1 "$at/dd.log")"
fi
run "run" --steps $((steps_of * every)) --save "$at/checkpoints" --save-every "$every" --keep 1 --metrics "$at/metrics.jsonl" > "$at/run.log" 2>&1 || { tail -20 "$at/run.log"; exit 1; }
[ -z "$short" ] && {
drop
cat "$at"/checkpoints/step-*/rank-*.safetensors | dd of=/dev/null bs=16M 2> "$at/dd.log" || true
figure "dd read, cold" "$(tail -1 "$at/dd.log")"
drop
for heat in cold warm; do
  run "resume $heat" --steps $((2 * every + 2)) --resume "$at/checkpoints" --metrics "$at/resume-$heat.jsonl" > "$at/resume-$heat.log" 2>&1 || tail -20 "$at/resume-$heat.log"
done
}
[ -z "$short" ] || [ -n "${EXPORT:-}" ] && {
watched "export" $rankc export hf "$at/checkpoints" -o "$at/model" > "$at/export.log" 2>&1 || tail -20 "$at/export.log"
figure "export bytes" "$(du -sb "$at/model" | cut -f1)"
}
python3 - "$at" <<'P'
import glob, json, os, statistics, sys
at = sys.argv[1]
def lines(name):
    try: return [json.loads(l) for l in open(f"{at}/{name}")]
    except OSError: return []
run = lines("metrics.jsonl")
rows = []
def start(name, all):
    for l in all:
        if "startup_seconds" in l:
            rows.append((name, f"{sum(l['startup_seconds'].values()):.1f} s: " + ", ".join(f"{k} {v:.2f}" for k, v in l["startup_seconds"].items())))
start("first step after", run)
for n, l in enumerate([l for l in run if "save_stall_seconds" in l]):
    rows.append((f"stall of save {n + 1}", f"{l['save_stall_seconds']:.3f} s: " + ", ".join(f"{k} {v:.3f}" for k, v in l.get("save_stall_parts", {}).items())))
for l in run:
    if "save_seconds" in l: rows.append(("save", f"{l['save_seconds']:.1f} s, pinned {l.get('save_pinned_bytes', 0) >> 20} MiB"))
saved = [l for l in open(f"{at}/run.log") if "saved" in l]
rows += [("", l.strip().split("\r")[-1]) for l in saved]
steps = [l["seconds"] for l in run[3:] if "save_stall_seconds" not in l]
half = next((n for n, l in enumerate(run) if "save_stall_seconds" in l), 0)
during = [l["seconds"] for l in run[half + 2:half + 80]]
before = [l["seconds"] for l in run[5:half]]
if before and during: rows.append(("step, before / while saving", f"median {statistics.median(before):.4f} / {statistics.median(during):.4f} s, slowest {max(before):.3f} / {max(during):.3f}"))
rows.append(("bytes of a checkpoint", str(sum(os.path.getsize(f) for f in glob.glob(f"{at}/checkpoints/step-*/*")))))
for heat in ("cold", "warm"): start(f"resume, {heat}", lines(f"resume-{heat}.jsonl"))
rows += [tuple(l.rstrip("\n").split("=", 1)) for l in open(f"{at}/figures")]
for name, value in rows: print(f"{name:32} {value}")
P
