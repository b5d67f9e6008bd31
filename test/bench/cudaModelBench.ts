/**
 * A whole model on one GPU: milliseconds and TFLOP/s of forward and backward of a Mixtral-8x7B-shaped model of four layers
 * (2 sequences of 4096 tokens, bf16). Steps of 2 and of 6 microbatches are timed in turns; what four more of them take is forward
 * and backward alone. Random tokens and weights. Then where the time goes. One JSON object to stdout, all else to stderr.
 *
 *     npm run bench:cuda-model -- [--layers 4] [--steps 10] [--limit 60] [--issue]
 *
 * Each part has its limit, a step --limit seconds: past it the script says where it stood, and ends. With --issue no step is a graph and
 * every instruction is followed, so that one which hangs is named. Started by node itself: the command tsx keeps a script whose main
 * thread is blocked from ending by SIGTERM.
 */

import { parseArgs } from "node:util";
import { type CudaRanks, openCuda } from "../../runtime/cuda/backend.ts";
import { runOn } from "../../runtime/train/loop.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { printProfile, profileRows } from "../../src/report/profile.ts";
import { startDeadline } from "../support/deadline.ts";
import { jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";

const { values } = parseArgs({
  options: {
    layers: { type: "string", default: "4" },
    steps: { type: "string", default: "10" },
    limit: { type: "string", default: "60" },
    issue: { type: "boolean", default: false },
  },
});
const [layers, steps, limit] = [values.layers, values.steps, values.limit].map(Number) as [number, number, number];
const [hidden, ffn, heads, kv, head, vocab, seq, experts, topK, B] = [4096, 14336, 32, 8, 128, 32000, 4096, 8, 2, 2];
const next = random(3);

let running: CudaRanks | undefined;
const limits = startDeadline("cudaModelBench", () => {
  const at = running?.underWay();
  return at && `the device has not done ${at.id} (${at.kernel})`;
});

/** The same numbers over and over, for each name from another on: a view, for 24 GB of weights need no 24 GB of the host. */
const pattern = 1 << 20;
let numbers = new Float32Array(0);
function weights(name: string, sizes: readonly number[]): Float32Array {
  limits.at(`weights of ${name}`);
  const n = sizes.reduce((a, b) => a * b, 1);
  if (sizes.length === 1) return new Float32Array(n).fill(1);
  if (!numbers.length) {
    numbers = new Float32Array(pattern + experts * hidden * ffn);
    for (let i = 0; i < pattern; i++) numbers[i] = (next() + next() + next()) * 0.02;
    for (let done = pattern; done < numbers.length; done *= 2) numbers.copyWithin(done, 0, Math.min(done, numbers.length - done));
  }
  const from = [...name].reduce((h, c) => (h * 31 + c.charCodeAt(0)) % 997, 7);
  return numbers.subarray(from, from + n);
}

async function open(what: string, microbatches: number, profile: boolean) {
  limits.part(`${what}: memory and kernels`, 240);
  const job = jobOf({
    name: `mixtral-8x7b-${layers}-layers`,
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
  const source = (file: string): string => {
    limits.at(`${file} is compiled`);
    return sources.get(file)!;
  };
  const localRanks = await openCuda(plan, {
    ...{ rank: 0, device: 0, profile, share: async (_: string, __: readonly number[], make: () => Uint8Array) => make() },
    files: { source },
  });
  running = localRanks;
  const own = localRanks.rankDevice(0);
  const backend: typeof own = {
    ...own,
    compute(i, copy) {
      limits.at(`${i.id} is issued`);
      own.compute(i, copy);
    },
  };
  let replayed = false;
  const onProgress = {
    ...localRanks,
    backend: () => backend,
    beginStep: (microbatches: number) => (replayed = localRanks.beginStep(microbatches)),
    finish() {
      limits.at(replayed ? "a graph is replayed" : "all is issued");
      return localRanks.finish();
    },
  };
  const batch = () => {
    const tokens = () => Int32Array.from({ length: B * microbatches * seq }, () => Math.floor(((next() + 1) / 2) * vocab));
    return { ids: tokens(), labels: tokens() };
  };
  limits.part(`${what}: weights`, 300);
  const run = runOn(plan, { localRanks: onProgress, batch, checkpoint: { read: weights } });
  return {
    ...{ plan, localRanks, run },
    async step(n: number) {
      limits.part(`${what}: step ${n}`, limit);
      const result = await run.step();
      process.stderr.write(`          ${(result.seconds * 1e3).toFixed(1)} ms, loss ${result.loss.toFixed(3)}\n`);
      return result;
    },
    async close() {
      limits.part(`${what}: the end`, 60);
      running = undefined;
      await run.close();
    },
  };
}
const median = (all: readonly number[]): number => [...all].sort((a, b) => a - b)[Math.floor(all.length / 2)]!;

/** Medians of all steps but the first four. */
async function secondsOf(microbatches: number) {
  const { plan, localRanks, step, close } = await open(`${microbatches} microbatches`, microbatches, values.issue);
  const seconds: number[] = [];
  const idle: number[] = [];
  let loss = 0;
  for (let n = 1; n <= steps; n++) {
    const result = await step(n);
    loss = result.loss;
    if (n <= Math.min(4, steps - 1)) continue;
    seconds.push(result.seconds);
    const share = localRanks.idle();
    if (share !== undefined) idle.push(share);
  }
  await close();
  return { seconds: median(seconds), idle: idle.length ? median(idle) : null, loss, peak: plan.memory[0]!.peak };
}

const few = await secondsOf(2);
const many = await secondsOf(6);
const seconds = (many.seconds - few.seconds) / 4;
const tokens = B * seq;
const active = layers * (2 * hidden * heads * head + 2 * hidden * kv * head + topK * 3 * hidden * ffn + hidden * experts) + hidden * vocab;
const attention = layers * 3.5 * 2 * B * heads * seq * seq * head;
const flops = 6 * active * tokens + attention;
process.stderr.write(`forward and backward: ${(seconds * 1e3).toFixed(1)} ms, ${(flops / seconds / 1e12).toFixed(0)} TFLOP/s\n`);

const { plan, run, step, close } = await open("profile", 2, true);
await step(1);
await step(2);
const timings = await run.profile();
await close();
process.stderr.write(printProfile(plan, timings, 60));
process.stdout.write(
  `${JSON.stringify({
    ...{ layers, graph: !values.issue },
    ...{
      forward_backward_ms: seconds * 1e3,
      tflops: flops / seconds / 1e12,
      flops,
      step_of_2_ms: few.seconds * 1e3,
      step_of_6_ms: many.seconds * 1e3,
    },
    ...{ idle_share_of_2: few.idle, idle_share_of_6: many.idle },
    ...{ loss: many.loss, plan_peak_gib: few.peak / 2 ** 30, profiled_step_ms: (timings.at(-1)!.end_us - timings[0]!.begin_us) / 1e3 },
    optimizer_ms: (few.seconds - 2 * seconds) * 1e3,
    by_op: Object.fromEntries(
      profileRows(plan, timings).reduce((all, r) => all.set(r.op, (all.get(r.op) ?? 0) + r.milliseconds), new Map<string, number>()),
    ),
  })}\n`,
);
