/**
 * A whole model on one GPU: the milliseconds of a step of one microbatch, of its forward and backward part and of its optimizer, tokens and
 * floating-point operations a second, the plan's peak memory and what the device has allocated, and where the time goes. One job a call; random tokens and weights. One JSON
 * object to stdout, all else to stderr.
 *
 *     npm run bench:cuda-model -- [test/bench/jobs/mixtral-8x7b-4-layers.yaml] [--set KEY=VALUE] [--steps 9] [--rows 60] [--limit 60]
 *     [--without heads] [--with norm_sums] [--one-by-one]
 *
 * `moe` is the time of the layers of experts with their routers, `host_ms` what the host takes between two replays, for the inputs and for the launch.
 * step_ms is of steps that are replayed as a graph, from the end of one to the end of the next; a step is issued while the step before it runs, with --one-by-one after its end.
 * forward_backward_ms and optimizer_ms are of steps with events at the ends of these parts only, as peers are measured; `moe`, by_op and the table are of the median of
 * three more steps, whose instructions are timed one by one, which takes 1 to 3 µs more for each. With
 * --profile-only no step is a graph: one set of weights is written instead of two. --without and --with name fusions that the plan lacks, or has beside those of the target. Each part of the script has its limit, a step --limit
 * seconds: past it the script prints where it stood, and ends. Started by node itself: the command tsx keeps a script whose main thread
 * is blocked from ending by SIGTERM.
 */

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { parse } from "yaml";
import { type CudaRanks, openCuda } from "../../runtime/cuda/backend.ts";
import { driver } from "../../runtime/cuda/driver.ts";
import type { TimedWork } from "../../runtime/cuda/streams.ts";
import { runOn } from "../../runtime/train/loop.ts";
import type { Plan } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import type { Timing } from "../../schemas/timing.ts";
import { type Fusion, fusions } from "../../src/codegen/targetNames.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { printProfile, profileRows } from "../../src/report/profile.ts";
import { startDeadline } from "../support/deadline.ts";
import { jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    set: { type: "string", multiple: true, default: [] },
    without: { type: "string", multiple: true, default: [] },
    with: { type: "string", multiple: true, default: [] },
    steps: { type: "string", default: "9" },
    rows: { type: "string", default: "60" },
    limit: { type: "string", default: "60" },
    "profile-only": { type: "boolean", default: false },
    "one-by-one": { type: "boolean", default: false },
  },
});
const [file = "test/bench/jobs/mixtral-8x7b-4-layers.yaml"] = positionals;
const [steps, rows, limit] = [Number(values.steps), Number(values.rows), Number(values.limit)];
const job = jobOf(parse(readFileSync(file, "utf8")), values.set);
const target = await loadTarget("cuda:sm_90a");
const named = [...values.without, ...values.with];
const unknown = named.find((name) => !fusions.some((f) => f === name));
if (unknown !== undefined) throw new Error(`there is no fusion ${unknown}; there are ${fusions.join(", ")}`);
const isChosen = (name: Fusion) => values.with.includes(name) || ((target.fuses ?? []).includes(name) && !values.without.includes(name));
const { plan, sources } = compile(job, { target: { ...target, fuses: fusions.filter(isChosen) } });
const next = random(3);

let running: CudaRanks | undefined;
const limits = startDeadline("cudaModelBench", () => {
  const at = running?.underWay();
  return at && `the device has not done ${at.id} (${at.kernel})`;
});

/** One array of random numbers serves every parameter, from another place on for each name: weights of 30 GB need no 30 GB of the host. */
const period = 1 << 20;
const largest = Math.max(...plan.programs.flatMap((p) => p.buffers.filter((b) => b.kind === "parameter")).map((b) => elementsOf(b.shape)));
const numbers = new Float32Array(period + largest);
for (let i = 0; i < period; i++) numbers[i] = (next() + next() + next()) * 0.02;
for (let done = period; done < numbers.length; done *= 2) numbers.copyWithin(done, 0, Math.min(done, numbers.length - done));
function weights(name: string, sizes: readonly number[]): Float32Array {
  limits.at(`weights of ${name}`);
  const count = elementsOf(sizes);
  if (sizes.length === 1) return new Float32Array(count).fill(1);
  const from = [...name].reduce((h, c) => (h * 31 + c.charCodeAt(0)) % 997, 7);
  return numbers.subarray(from, from + count);
}

async function open(what: string, profile: TimedWork) {
  limits.part(`${what}: memory and kernels`, 240);
  const source = (name: string): string => {
    limits.at(`${name} is compiled`);
    const text = sources.get(name);
    if (text === undefined) throw new Error(`the plan has no source ${name}`);
    return text;
  };
  const localRanks = await openCuda(plan, {
    ...{ rank: 0, device: 0, profile, share: async (_: string, __: readonly number[], make: () => Uint8Array) => make() },
    files: { source },
  });
  running = localRanks;
  const own = localRanks.rankDevice(0);
  const device: typeof own = {
    zeroGradients: () => own.zeroGradients(),
    draw: (buffers, draw) => own.draw(buffers, draw),
    read: (buffer, copy) => own.read(buffer, copy),
    compute(...[i, copy, first]: Parameters<typeof own.compute>) {
      limits.at(`${i.id} is issued`);
      own.compute(i, copy, first);
    },
    write(buffer, copy, data) {
      // 16-bit weights are made from the main weights at the end of the first step; rounding them on the host takes a minute
      if (buffer.kind === "parameter" && buffer.dtype !== "f32") return;
      own.write(buffer, copy, data);
    },
  };
  let replayed = false;
  // milliseconds of the host: from the end of a step to the begin of the next, if it begins after it; writes of inputs; the launch
  const host = { ended: 0, begun: 0, between: [] as number[], writes: [] as number[], launch: [] as number[] };
  const watched = {
    ...localRanks,
    rankDevice: () => device,
    beginStep(microbatches: number) {
      host.begun = performance.now();
      if (values["one-by-one"]) host.between.push(host.begun - host.ended);
      return (replayed = localRanks.beginStep(microbatches));
    },
    async finish() {
      limits.at(replayed ? "a graph is replayed" : "all is issued");
      const walked = performance.now();
      const finished = localRanks.finish();
      host.writes.push(walked - host.begun);
      host.launch.push(performance.now() - walked);
      await finished;
      host.ended = performance.now();
    },
  };
  const tokens = (count: number) => Int32Array.from({ length: count }, () => Math.floor(((next() + 1) / 2) * job.model.vocab));
  const batch = (_: number, count: number) => ({ ids: tokens(count * job.model.seq), labels: tokens(count * job.model.seq) });
  limits.part(`${what}: weights`, 300);
  const run = runOn(plan, { localRanks: watched, batch, checkpoint: { read: weights } });
  return {
    ...{ localRanks, run, host },
    /** `last`: the number of the last step. */
    async step(n: number, last: number) {
      limits.part(`${what}: step ${n}`, limit);
      const result = await run.step({ next: n < last && !values["one-by-one"] ? {} : undefined });
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
const median = (all: readonly number[]): number => [...all].sort((a, b) => a - b)[Math.floor(all.length / 2)] ?? Number.NaN;

/** Medians of replayed steps: milliseconds as the host sees them, and the share in which the device waits for the host. */
async function replays() {
  const { localRanks, host, step, close } = await open("graph", false);
  const milliseconds: number[] = [];
  const idle: number[] = [];
  for (let n = 1; n <= steps + 3; n++) {
    const { seconds } = await step(n, steps + 3);
    // two steps are issued and captured, and the first replay uploads the graph
    if (n <= 3) continue;
    milliseconds.push(seconds * 1e3);
    const share = localRanks.idle();
    if (share !== undefined) idle.push(share);
  }
  await close();
  const { between, writes, launch } = host;
  const host_ms = Object.fromEntries(Object.entries({ between, writes, launch }).map(([name, all]) => [name, median(all.slice(3))]));
  return { step_ms: median(milliseconds), idle_share: idle.length ? median(idle) : null, host_ms };
}

/** Milliseconds on the device from the first instruction to the last of those in `ids`. */
function spanOf(timings: readonly Timing[], ids: ReadonlySet<string>): number {
  const within = timings.filter((t) => ids.has(t.id));
  return (Math.max(...within.map((t) => t.end_us)) - Math.min(...within.map((t) => t.begin_us))) / 1e3;
}
const idsOf = (instructions: Plan["programs"][number]["step"]) => new Set(instructions.map((i) => i.id));

/** Steps whose instructions are timed one by one: a single one may fall into a dip of the clock. */
const TIMED = 3;

/** Medians of steps in which only the ends of both parts are timed, and the instructions of the median of `TIMED` more steps. */
async function profiled() {
  const chunks = plan.programs.flatMap((p) => p.chunks);
  const [model, optimizer] = [chunks.flatMap((c) => [...c.forward, ...c.backward, ...c.weights]), plan.programs.flatMap((p) => p.step)];
  const [inModel, inOptimizer] = [idsOf(model), idsOf(optimizer)];
  const lists = [...chunks.flatMap((c) => [c.forward, c.backward, c.weights]), optimizer];
  const ends = idsOf(lists.flatMap((list) => [...list.slice(0, 1), ...list.slice(-1)]));
  let isWhole = false;
  const { run, step, close } = await open("profile", (id) => isWhole || ends.has(id));
  const times: { readonly model: number; readonly optimizer: number; readonly all: number }[] = [];
  for (let n = 1; n <= steps + 1; n++) {
    await step(n, n);
    const timings = await run.profile();
    if (n > 1)
      times.push({
        model: spanOf(timings, inModel),
        optimizer: spanOf(timings, inOptimizer),
        all: spanOf(timings, new Set([...inModel, ...inOptimizer])),
      });
  }
  isWhole = true;
  const whole: (readonly Timing[])[] = [];
  for (let n = 1; n <= TIMED; n++) {
    await step(steps + 1 + n, steps + 1 + n);
    whole.push(await run.profile());
  }
  const sumOf = (all: readonly Timing[]): number => all.reduce((sum, t) => sum + t.end_us - t.begin_us, 0);
  const timings = [...whole].sort((x, y) => sumOf(x) - sumOf(y))[Math.floor(TIMED / 2)] ?? [];
  const device_gib = (heldBytes() - heldBefore) / 2 ** 30;
  await close();
  return {
    ...{ timings, device_gib },
    forward_backward_ms: median(times.map((t) => t.model)),
    optimizer_ms: median(times.map((t) => t.optimizer)),
    instructions_ms: median(times.map((t) => t.all)),
  };
}

const [gpu] = driver().devices;
if (!gpu) throw new Error("there is no CUDA device");
const context = driver().open(gpu);
/** Bytes of the device that others, and the context, hold before the model is there. */
const heldBefore = heldBytes();
function heldBytes(): number {
  const { free, total } = context.memory();
  return total - free;
}

const graph = values["profile-only"] ? undefined : await replays();
const { timings, ...parts } = await profiled();
const table = profileRows(plan, timings);
const flops = table.reduce((sum, r) => sum + r.tflops * r.milliseconds * 1e9, 0);
/** The layers of experts with their routers: products, copies and sums of rows, forward and backward. */
const experts = table.filter(({ id, op }) => id.includes(".moe.") || op.startsWith("unpermute"));
const expertsMs = experts.reduce((sum, r) => sum + r.milliseconds, 0);
const expertsFlops = experts.reduce((sum, r) => sum + r.tflops * r.milliseconds * 1e9, 0);
const tokens = job.train.global_batch * job.model.seq;
process.stderr.write(printProfile(plan, timings, rows));
process.stdout.write(
  `${JSON.stringify({
    ...{ job: job.name, ...graph, ...parts, flops },
    tflops: flops / parts.forward_backward_ms / 1e9,
    ...(expertsMs > 0 && { moe: { ms: expertsMs, tflops: expertsFlops / expertsMs / 1e9 } }),
    ...(graph && { tokens_per_second: tokens / graph.step_ms / 1e-3 }),
    plan_peak_gib: Math.max(...plan.memory.map((m) => m.peak)) / 2 ** 30,
    launches: timings.length,
    by_op: Object.fromEntries(table.reduce((all, r) => all.set(r.op, (all.get(r.op) ?? 0) + r.milliseconds), new Map<string, number>())),
  })}\n`,
);
