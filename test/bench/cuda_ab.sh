#!/bin/sh
# Forward and backward of whole models in one call on one GPU: another checkout of rankc, this one, this one without fusions and with further ones.
#
#     sh test/bench/cuda_ab.sh [BEFORE] > ab.txt
#
# BEFORE: the folder of another checkout (inside this one it shares the packages); without it only this one runs. Each variant of a job runs in turn, 3 steps
# with timed instructions. One line a run: job, variant, ms of forward and backward, ms of the optimizer, TFLOP/s, and the ms of the ops that differ.
# Variables: JOBS (names of test/bench/jobs), WITHOUT and WITH (further variants of each job, separated by spaces: the fusions that one lacks, or has
# beside those of the target, separated by commas; "-" for no such variant), ROUNDS (2; each second one in reverse order), STEPS (3). About 10 s a run.
# Tables of instructions go to $OUT, if it is set. In a card that is bound by power the same kernels differ by 2 % between runs: compare the ms of ops before those of steps.
set -u
here=$(cd "$(dirname "$0")/../.." && pwd)
before=${1:-}
jobs=${JOBS:-qwen3-30b-12-layers}
without=${WITHOUT:--}
with=${WITH:-heads}
logs=${OUT:-$(mktemp -d)}
node=$(command -v node || echo "$here/node_modules/.bin/node")

measure() { # job, variant, checkout, options of the bench
  job=$1 variant=$2 folder=$3
  shift 3
  (cd "$folder" && timeout 120 "$node" --import tsx/esm test/bench/cudaModelBench.ts "test/bench/jobs/$job.yaml" --profile-only --steps "${STEPS:-3}" "$@") \
    > "$logs/$job.$variant.json" 2> "$logs/$job.$variant.txt"
  "$node" -e '
    const [job, variant, file] = process.argv.slice(1);
    const text = require("fs").readFileSync(file, "utf8").trim();
    if (text === "") { console.log(job, variant, "failed: see the .txt beside", file); process.exit(0); }
    const r = JSON.parse(text.split("\n").at(-1));
    const shown = ["grouped_wgrad", "grouped_gemm", "grouped_dgrad", "add", "rmsnorm", "rope", "head_norm", "embed_grad", "attention_grad", "gemm", "swiglu", "permute", "unpermute"];
    const sum = (op) => Object.entries(r.by_op).reduce((all, [name, ms]) => all + (name.startsWith(op) ? ms : 0), 0);
    console.log(job, variant, r.forward_backward_ms.toFixed(2), r.optimizer_ms.toFixed(2), r.tflops.toFixed(0), shown.map((op) => op + " " + sum(op).toFixed(2)).join(", "));
  ' "$job" "$variant" "$logs/$job.$variant.json"
}

# names of fusions, an option -> the option before each name
options() { echo "$1" | tr ',' '\n' | sed "s/^/$2 /"; }

echo "job variant forward_backward_ms optimizer_ms TFLOP/s ms_by_op"
round=1
while [ "$round" -le "${ROUNDS:-2}" ]; do
  order="before now"
  [ "$without" = "-" ] || for name in $without; do order="$order without:$name"; done
  [ "$with" = "-" ] || for name in $with; do order="$order with:$name"; done
  [ $((round % 2)) -eq 0 ] && order=$(for name in $order; do echo "$name"; done | sed '1!G;h;$!d')
  for job in $jobs; do
    for variant in $order; do
      case $variant in
        before) [ -n "$before" ] && measure "$job" "before.$round" "$before" ;;
        now) measure "$job" "now.$round" "$here" ;;
        without:*) measure "$job" "without-${variant#*:}.$round" "$here" $(options "${variant#*:}" --without) ;;
        with:*) measure "$job" "with-${variant#*:}.$round" "$here" $(options "${variant#*:}" --with) ;;
      esac
    done
  done
  round=$((round + 1))
done
