/**
 * A whole model on one GPU: milliseconds and TFLOP/s of forward and backward of a Mixtral-8x7B-shaped model of four layers
 * (2 sequences of 4096 tokens, bf16). Steps of 2 and of 6 microbatches are timed in turns; what four more of them take is forward
 * and backward alone. Random tokens and weights. Then where the time goes. One JSON object to stdout, the table to stderr.
 */

import { openCuda } from "../runtime/cuda/backend.ts";
import { runOn } from "../runtime/execute.ts";
import { compile } from "../src/compile.ts";
import { loadTarget } from "../src/makers.ts";
import { printProfile, profileRows } from "../src/profile.ts";
import { random } from "./opCases.ts";
import { jobOf } from "./support.ts";

const [layers, hidden, ffn, heads, kv, head, vocab, seq, experts, topK, B] = [4, 4096, 14336, 32, 8, 128, 32000, 4096, 8, 2, 2];
const next = random(3);
const pattern = Float32Array.from({ length: 1 << 20 }, () => (next() + next() + next()) * 0.02);

/** The same numbers over and over, another piece first for each name. */
function weights(name: string, sizes: readonly number[]): Float32Array {
  const n = sizes.reduce((a, b) => a * b, 1);
  const out = new Float32Array(n);
  if (sizes.length === 1) return out.fill(1);
  const from = [...name].reduce((h, c) => (h * 31 + c.charCodeAt(0)) % 997, 7);
  out.set(pattern.subarray(from, Math.min(pattern.length, from + n)));
  for (let done = Math.min(n, pattern.length - from); done < n; done *= 2) out.copyWithin(done, 0, Math.min(done, n - done));
  return out;
}

async function open(microbatches: number, profile = false) {
  const job = jobOf({
    name: "mixtral-8x7b-4-layers",
    model: {
      ...{ layers, hidden, ffn, heads, kv_heads: kv, head_dim: head, vocab, seq },
      moe: { experts, top_k: topK, ffn, router: { balance: "none" } },
    },
    parallel: { world: 1 },
    train: { micro_batch: B, global_batch: B * microbatches, steps: 100, precision: "bf16", optimizer: { lr: 1e-6 } },
    data: { path: "corpus.txt" },
    cluster: { device: "h200-141gb" },
  });
  const { plan, sources } = compile(job, { target: await loadTarget("cuda:sm_90a") });
  const fleet = await openCuda(plan, {
    ...{ rank: 0, device: 0, profile, share: async (_: string, __: readonly number[], make: () => Uint8Array) => make() },
    files: { source: (file) => sources.get(file)! },
  });
  const batch = () => {
    const tokens = () => Int32Array.from({ length: B * microbatches * seq }, () => Math.floor(((next() + 1) / 2) * vocab));
    return { ids: tokens(), labels: tokens() };
  };
  return { plan, fleet, run: runOn(plan, { fleet, batch, checkpoint: { read: weights } }) };
}
const median = (numbers: readonly number[]): number => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)]!;

async function secondsOf(microbatches: number): Promise<{ seconds: number; loss: number; peak: number; idle: number }> {
  process.stderr.write(`${microbatches} microbatches: weights and kernels\n`);
  const { plan, fleet, run } = await open(microbatches);
  const seconds: number[] = [];
  const idle: number[] = [];
  let loss = 0;
  for (let step = 0; step < 10; step++) {
    const result = await run.step();
    loss = result.loss;
    process.stderr.write(
      `${microbatches} microbatches, step ${step + 1}: ${(result.seconds * 1e3).toFixed(1)} ms, loss ${loss.toFixed(3)}\n`,
    );
    if (step > 3) seconds.push(result.seconds);
    if (step > 3) idle.push(fleet.idle()!);
  }
  await run.close();
  return { seconds: median(seconds), idle: median(idle), loss, peak: plan.memory[0]!.peak };
}

const few = await secondsOf(2);
const many = await secondsOf(6);
const seconds = (many.seconds - few.seconds) / 4;
const tokens = B * seq;
const active = layers * (2 * hidden * heads * head + 2 * hidden * kv * head + topK * 3 * hidden * ffn + hidden * experts) + hidden * vocab;
const attention = layers * 3.5 * 2 * B * heads * seq * seq * head;
const flops = 6 * active * tokens + attention;

const { plan, run } = await open(2, true);
await run.step();
await run.step();
const timings = await run.profile();
await run.close();
process.stderr.write(printProfile(plan, timings, 60));
const step = timings.at(-1)!.end_us - timings[0]!.begin_us;
process.stdout.write(
  `${JSON.stringify({
    ...{
      forward_backward_ms: seconds * 1e3,
      tflops: flops / seconds / 1e12,
      flops,
      step_of_2_ms: few.seconds * 1e3,
      step_of_6_ms: many.seconds * 1e3,
    },
    ...{ idle_share_of_2: few.idle, idle_share_of_6: many.idle },
    ...{ loss: many.loss, plan_peak_gib: few.peak / 2 ** 30, profiled_step_ms: step / 1e3 },
    optimizer_ms: (few.seconds - 2 * seconds) * 1e3,
    by_op: Object.fromEntries(
      profileRows(plan, timings).reduce((all, r) => all.set(r.op, (all.get(r.op) ?? 0) + r.milliseconds), new Map<string, number>()),
    ),
  })}\n`,
);
