#!/bin/bash
# Training on text on one GPU, through the command line: a corpus of what lies on the machine, data sets, 2,000 steps of a model of 125 million
# parameters with evaluations and a log, the cost of both and of the norm of the weights, and evaluations of the result on validation, test and training data.
#
#   OUT=results RANKC="$NODE dist/cli/rankc.cjs" bash test/bench/text_device.sh      Python with tokenizers and tensorboard; no network
#
# Without a GPU, to try it:   SIZE=small BACKEND=cpu TARGET=cpu STEPS=40 PAIR=30 MIB=4 IDS=600 bash test/bench/text_device.sh
# Writes OUT/log (event file, metrics.csv, evaluations.csv, run.json), OUT/losses.csv and OUT/text.log. Takes about 170 s on an H200.
#
# What to compare with, before it is run:
#   validation = training data within 0.1 of each other and of the mean training loss: all three have one distribution, and less than an epoch is read.
#   by-folder: the last 2 % of documents in the order of folders; the model has seen them (all folders are in the training part), so it is no longer above.
#   median with / median without at most 1.01; all runs of one length end with the same bits of the loss. The norm of the weights costs
#   0.5 ms in each logged step of 30 ms (0.5 GB at 4.5 TB/s, and 222 small launches), so 0.2 % with every tenth step logged; the median does not show it.
set -euo pipefail
at=${AT:-/tmp/rankc-text} out=${OUT:-/tmp/rankc-text-out} steps=${STEPS:-2000} pair=${PAIR:-300} every=${EVERY:-$((${STEPS:-2000} / 8))}
backend=${BACKEND:-cuda} target=${TARGET:-cuda:sm_90a} ids=${IDS:-32768} size=${SIZE:-large} mib=${MIB:-280}
rankc=${RANKC:-node --import tsx/esm src/cli/main.ts} python=${PYTHON:-python3}
here=$(dirname "$0")
device=$([ "$backend" = cuda ] && echo h200-141gb || echo cpu)
rm -rf "$at" "$out/log"; mkdir -p "$at" "$out"
exec > >(tee "$out/text.log") 2>&1
took() { echo "[$SECONDS s] $1"; }

$python "$here/text_device.py" corpus "$at" "$mib"; took corpus
$python "$here/text_device.py" tokenizer "$at" "$ids"; took tokenizer
for name in code prose code-by-folder prose-by-folder; do
  $rankc data prepare "$at/$name.jsonl" --tokenizer "$at/tokenizer.json" --out "$at/$name" | tail -1
done; took "data sets"
$python "$here/text_device.py" jobs "$at" "$steps" "$every" "$device" "$ids" "$size"
pids=() # wait without arguments would wait for tee as well
for name in with without norm training by-folder; do
  $rankc compile "$at/$name.yaml" --target "$target" -o "$at/plan-$name" > "$at/compile-$name.log" 2>&1 & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || { tail -n 20 "$at"/compile-*.log; exit 1; }; done; took plans

common=(--backend "$backend" --data-dir "$at")
$rankc run "$at/plan-with" "${common[@]}" --log "$at/log" --save "$at/checkpoint" > "$at/run.log" 2>&1 || { tail -20 "$at/run.log"; exit 1; }
grep -E "validation loss|test loss|steps in" "$at/run.log" || true; took "$steps steps with evaluations and a log"
evaluate() { $rankc eval "$at/plan-$1" "${common[@]}" --resume "$at/checkpoint" --on "$2" --format json > "$at/eval-$3.json" 2> "$at/eval-$3.log" || { tail -5 "$at/eval-$3.log"; }; }
evaluate with validation validation; evaluate with test test; evaluate training validation training; evaluate by-folder validation by-folder
took evaluations

# the cost of evaluations and logs: runs of the same length, in alternation
one() { # plan number options…
  local name=$1-$2 begun; begun=$(date +%s.%N)
  $rankc run "$at/plan-$1" "${common[@]}" --steps "$pair" --metrics "$at/$name.jsonl" "${@:3}" > "$at/$name.log" 2>&1 || { tail -20 "$at/$name.log"; exit 1; }
  $python -c "print(round($(date +%s.%N) - $begun, 1))" > "$at/$name.jsonl.wall"
}
one without 1; one with 1 --log "$at/log-with-1"; one norm 1 --log "$at/log-norm-1" --log-interval 10
[ "$SECONDS" -gt "${LIMIT:-165}" ] || { one without 2; one with 2 --log "$at/log-with-2"; }
took "runs of $pair steps"

mkdir -p "$out/log"
cp "$at"/log/events.out.tfevents.* "$at/log/metrics.csv" "$at/log/evaluations.csv" "$at/log/run.json" "$out/log/"
$python - "$at/log/metrics.jsonl" > "$out/losses.csv" <<'E'
import json, sys
print("step,loss,grad_norm")
for line in open(sys.argv[1]):
    x = json.loads(line)
    if "lm loss" in x: print(x["step"], x["lm loss"], x["grad-norm"], sep=",")
E
$python "$here/text_device.py" report "$at" "$out"; took "all"
