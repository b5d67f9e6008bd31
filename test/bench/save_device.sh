#!/bin/bash
# Start, save, resume, export and load of a job on one GPU through the command line, beside what the disk can do. Prints all figures, and
# one row of the table in docs/performance.md.
#
#   bash test/bench/save_device.sh [JOB] [FOLDER] [SAVE_EVERY]
#
# JOB: a job of one rank (default: test/bench/llama-1.1b.yaml). FOLDER: room for one checkpoint, the exported model and 7 GB (default:
# /tmp/rankc-save); the logs stay there. SAVE_EVERY: steps between two saves, which take longer than a save (default: 150); the run has
# twice as many.
# RANKC: the command (default: NODE dist/cli/rankc.cjs, with NODE from the environment or `node`). Needs python3, and root to drop caches.
# SHORT=1: one save, after SAVE_EVERY steps, which ends the run. ONLY_SAVE=1: no resume, export and load.
# FILL=1: another process holds the memory of the GPU that the steps leave free, so that saves have no staging area (needs torch).
#
# Prediction for llama-1.1b on an H200 (13.2 GB a checkpoint, 0.108 s a step, a disk of 0.96 GB/s written and 1.46 GB/s read by dd, 16 cores),
# made before the run; 140 s in all:
#   time to the first step       2.5 s with NVRTC (plan 0.3, device 0.6, kernels 1.4, weights 0.0, first step 0.1); 1.0 to 1.3 s cached
#   first stall                  0.03 s: previous 0; memory 0; copy 0.03, of which 7 ms are the copy of 13.2 GB at 2 TB/s and the rest
#                                the issue of 1,000 copies and the folder
#   save seconds                 11.4 to 15: 13.2 GB at the rate of dd, as each block is flushed when it is written
#   a step while a save runs     within 2 % of the median: 13.2 GB cross PCIe in bursts of 32 MiB
#   resume, "weights"            cold 8 to 9 s: the disk; warm 2.3 s: 8 readers at 1.5 GB/s of SHA-256, and 13.2 GB at 10 GB/s
#   export hf, bf16, warm        5 s with 16 cores
#   load of the export, cold     1.3 to 1.5 s for 2.2 GB by the disk, and 1 s of start
#   host memory                  530 MB beside page-locked memory (512 MiB of blocks for saves)
#   FILL=1: stalls               memory 8 to 11 s (page-locking 13.2 GB at 1.2 to 1.7 GB/s, less what 149 steps prepared), copy 0.27 s
set -euo pipefail
short=${SHORT:-} steps_of=2; [ -n "$short" ] && steps_of=1
job=${1:-test/bench/llama-1.1b.yaml} at=${2:-/tmp/rankc-save} every=${3:-150}
rankc=${RANKC:-${NODE:-node} dist/cli/rankc.cjs}
mkdir -p "$at"; rm -rf "$at"/{checkpoints,model,plan,cache,figures} "$at"/*.jsonl
cp "$job" "$at/job.yaml"
head -c 3000000 /dev/urandom | base64 > "$at/corpus.txt"
export XDG_CACHE_HOME="$at/cache"
figure() { echo "$1=$2" >> "$at/figures"; }
drop() { sync; echo 3 > /proc/sys/vm/drop_caches 2>/dev/null || echo "no right to drop caches: cold figures are warm"; }
# runs a command; writes its wall seconds, its peak of resident memory, and the median in the second half of its time. Page-locked memory
# counts as shared memory of the process.
watched() {
  python3 - "$at/figures" "$@" <<'P'
import statistics, subprocess, sys, time
figures, name, *command = sys.argv[1:]
begun = time.time()
process = subprocess.Popen(command)
seen = []
while process.poll() is None:
    try:
        status = dict(l.split(":", 1) for l in open(f"/proc/{process.pid}/status") if ":" in l)
        now = {k: int(status[k].split()[0]) // 1024 for k in ("VmRSS", "RssAnon", "RssFile", "RssShmem") if k in status}
        # a process that ends has no memory any more
        if now.get("VmRSS"): seen.append(now)
    except (OSError, KeyError, ValueError): pass
    time.sleep(0.05)
own = lambda s: s["VmRSS"] - s["RssShmem"]
with open(figures, "a") as out:
    out.write(f"{name} seconds={time.time() - begun:.1f}\n")
    if seen:
        most = max(seen, key=own)
        out.write(f"{name} peak of host memory [MiB]={own(most)}; anonymous {most['RssAnon']}, files {most['RssFile']}; "
                  f"page-locked at most {max(s['RssShmem'] for s in seen)}\n")
        out.write(f"{name} later host memory [MiB]={statistics.median(own(s) for s in seen[len(seen) // 2:]):.0f}\n")
sys.exit(process.returncode)
P
}
run() { watched "$1" $rankc run "$at/plan" --backend cuda --data-dir "$at" --metrics "$at/$1.jsonl" "${@:2}" > "$at/$1.log" 2>&1 || { tail -20 "$at/$1.log"; return 1; }; }
# reads at most 8.4 GB of a folder's tensors
dd_read() { cat "$1"/*.safetensors | dd of=/dev/null bs=16M count=500 iflag=fullblock 2> "$at/dd.log" || true; figure "$2" "$(tail -1 "$at/dd.log")"; }

$rankc compile "$at/job.yaml" --target cuda:sm_90a --no-cubins -o "$at/plan" > "$at/compile.log" 2>&1 || { tail -20 "$at/compile.log"; exit 1; }
figure "free disk at the begin" "$(df -h --output=avail "$at" | tail -1)"
if [ -n "${FILL:-}" ]; then
  python3 -c 'import torch,time
free, _ = torch.cuda.mem_get_info(); held = torch.empty(int(free - float("'"${FILL_LEAVES:-32e9}"'")), dtype=torch.uint8, device="cuda"); print("held", held.numel()); time.sleep(600)' &
  holder=$!; trap 'kill $holder 2>/dev/null' EXIT; sleep 8
fi
run nvrtc --steps 3
dd if=/dev/zero of="$at/dd" bs=64M count=100 conv=fsync 2> "$at/dd.log"; rm -f "$at/dd"
figure "dd write, 6.7 GB" "$(tail -1 "$at/dd.log")"
run save --steps $((steps_of * every)) --save "$at/checkpoints" --save-every "$every" --keep 1
figure "bytes of a checkpoint" "$(du -sbc "$at"/checkpoints/step-* | tail -1 | cut -f1)"
if [ -z "${ONLY_SAVE:-}" ]; then
  drop
  dd_read "$(ls -d "$at"/checkpoints/step-* | tail -1)" "dd read, cold"
  for heat in cold warm; do
    [ $heat = warm ] || drop
    run "resume-$heat" --steps $((steps_of * every + 2)) --resume "$at/checkpoints" || true
  done
  watched export $rankc export hf "$at/checkpoints" -o "$at/model" > "$at/export.log" 2>&1 || tail -20 "$at/export.log"
  figure "export bytes" "$(du -sb "$at/model" | cut -f1)"
  rm -rf "$at/checkpoints"
  drop
  for heat in cold warm; do run "load-$heat" --steps 3 --init-from "$at/model" || true; done
fi
rm -rf "$at/model"
python3 - "$at" "$(basename "$job" .yaml)" <<'P'
import json, statistics, sys
at, name = sys.argv[1:]
def lines(name):
    try: return [json.loads(l) for l in open(f"{at}/{name}.jsonl")]
    except OSError: return []
figures = dict(l.rstrip("\n").split("=", 1) for l in open(f"{at}/figures"))
rows = []
def start(name):
    for l in lines(name):
        if "startup_seconds" in l:
            parts = l["startup_seconds"]
            rows.append((f"{name}: first step after", f"{sum(parts.values()):.2f} s: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items())))
            return parts
    return {}
begins = {name: start(name) for name in ("nvrtc", "save", "resume-cold", "resume-warm", "load-cold", "load-warm")}
run = lines("save")
stalls = [l for l in run if "save_stall_seconds" in l]
for n, l in enumerate(stalls):
    rows.append((f"stall of save {n + 1}", f"{l['save_stall_seconds']:.3f} s: " + ", ".join(f"{k} {v:.3f}" for k, v in l.get("save_stall_parts", {}).items())))
saved = [l.strip().split("\r")[-1] for l in open(f"{at}/save.log") if "saved" in l]
rows += [("", l) for l in saved]
half = next((n for n, l in enumerate(run) if "save_stall_seconds" in l), 0)
during = [l["seconds"] for l in run[half + 2:half + 80]]
before = [l["seconds"] for l in run[5:half]]
if before: rows.append(("step before saves", f"median {statistics.median(before):.4f} s, slowest {max(before):.3f}"))
if during: rows.append(("step while saving", f"median {statistics.median(during):.4f} s, slowest {max(during):.3f}"))
rows += figures.items()
for what, value in rows: print(f"{what:40} {value}")
def total(name):
    parts = begins.get(name) or {}
    return f"{sum(parts.values()):.1f} (weights {parts.get('weights', 0):.1f})" if parts else "-"
rate = lambda key: figures.get(key, "-").split(", ")[-1]
memory = lambda name, kind="peak of": figures.get(f"{name} {kind} host memory [MiB]", "-").split(";")[0]
took = [l.split(" in ")[-1].split(" s,")[0] for l in saved]
print("\n| job | first step: NVRTC; cached (plan, device, kernels, weights, step) | load of the export, s: cold; warm | stall, s | save, s | bytes | dd writes; reads | "
      "resume, s: cold; warm | export, s | host memory without page-locked, MiB: start, later; save; resume; export; load |")
parts = ", ".join(f"{v:.2f}" for v in begins["save"].values())
print("|---" * 10 + "|")
print(f"| {name} | {sum(begins['nvrtc'].values()):.1f}; {sum(begins['save'].values()):.1f} ({parts}) | {total('load-cold')}; {total('load-warm')} | "
      f"{', '.join('%.3f' % l['save_stall_seconds'] for l in stalls)} | {', '.join(took)} | {figures.get('bytes of a checkpoint')} | "
      f"{rate('dd write, 6.7 GB')}; {rate('dd read, cold')} | {total('resume-cold')}; {total('resume-warm')} | {figures.get('export seconds', '-')} for {figures.get('export bytes', '-')} B | "
      f"{memory('nvrtc')}, {memory('nvrtc', 'later')}; {memory('save')}; {memory('resume-cold')}; {memory('export')}; {memory('load-cold')} |")
P
