/**
 * The WebGPU bench: rates of single kernels, what recording a dispatch costs the host, and a small mixture-of-experts model with
 * the share of each op, on this machine's own adapter. Times are the device's but for recording, medians of rounds that
 * alternate, on random data. Writes results/webgpu-<date>.md.
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { LocalRanks } from "../../runtime/backend.ts";
import { openCorpus } from "../../runtime/data/corpus.ts";
import { readingOf } from "../../runtime/train/inputs.ts";
import { runOn } from "../../runtime/train/loop.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import { binder } from "../../runtime/webgpu/bindings.ts";
import { commandsOn, type Dispatch } from "../../runtime/webgpu/commands.ts";
import { dawn, openWebgpu } from "../../runtime/webgpu/dawn.ts";
import { openDevice, usage } from "../../runtime/webgpu/device.ts";
import { type ComputePipeline, compiler, isNumber, uniformOf } from "../../runtime/webgpu/pipelines.ts";
import { bytesOf, type Dtype, encoded } from "../../schemas/dtypes.ts";
import type { OpName } from "../../schemas/opNames.ts";
import { blockOf } from "../../schemas/program.ts";
import { type GeneratedKernel, type KernelSpec, offsetsAt } from "../../src/codegen/kernelSpec.ts";
import { planLaunch } from "../../src/codegen/launchArgs.ts";
import type { Profile } from "../../src/codegen/targetNames.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { wgslGenerator } from "../../src/codegen/wgsl/index.ts";
import { compile } from "../../src/compile.ts";
import { profileRows } from "../../src/report/profile.ts";
import { root } from "../support/checkout.ts";
import { fixture, jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";

interface Case {
  readonly name: string;
  readonly profile: Profile;
  readonly use: KernelSpec;
  readonly flops: number;
  readonly rows?: Int32Array;
  readonly floor?: string;
}
const ROUNDS = 12;
/** Milliseconds of work before anything is measured. */
const WAKING = 1000;

const specFor = (
  op: OpName,
  d: Record<string, number>,
  size: Record<string, number>,
  dtype: Dtype,
  more: Partial<KernelSpec> = {},
): KernelSpec => ({
  ...{ op, name: `${op}_bench`, d, size, accumulates: new Set<string>(), bound: 0, makesRows: false, mayOverflow: false },
  dtype: Object.fromEntries(Object.keys(size).map((name) => [name, name === "lse" || name === "dw" ? "f32" : dtype])),
  ...more,
});
const gemm = (name: string, profile: Profile, dtype: Dtype, [m, n, k]: readonly [number, number, number], floor?: string): Case => ({
  ...{ name, profile, flops: 2 * m * n * k },
  use: specFor("gemm", { B: 1, S: m, K: k, N: n }, { x: m * k, w: k * n, y: m * n }, dtype),
  ...(floor ? { floor } : {}),
});
/** The products of the backward pass, whose operands lie otherwise. */
const gradient = (op: "gemm_dgrad" | "gemm_wgrad", name: string, profile: Profile, dtype: Dtype, size: number): Case => ({
  ...{ name, profile, flops: 2 * size ** 3 },
  use: specFor(
    op,
    { B: 1, S: size, K: size, N: size },
    Object.fromEntries((op === "gemm_dgrad" ? ["dy", "w", "dx"] : ["x", "dy", "dw"]).map((n) => [n, size * size])),
    dtype,
  ),
});
/** Rows of experts, uneven: every eighth has twice its share. */
function grouped(name: string, profile: Profile, dtype: Dtype, [S, N, K, E]: readonly [number, number, number, number]): Case {
  const share = S / E;
  const counts = Array.from({ length: E }, (_, e) => (e % 8 === 0 ? Math.round(share * 1.7) : Math.round(share * 0.9)));
  counts[E - 1]! += S - counts.reduce((a, b) => a + b, 0);
  const rows = new Int32Array(1 + 3 * S + E + 1);
  rows[0] = S;
  let r = 0;
  for (const [e, n] of counts.entries()) {
    rows[offsetsAt(S) + e] = r;
    for (let i = 0; i < n; i++, r++) rows.set([0, r, e], 1 + 3 * r);
  }
  rows[offsetsAt(S) + E] = r;
  const use = specFor("grouped_gemm", { B: 1, S, E, K, N }, { x: S * K, w: E * K * N, y: S * N }, dtype, { bound: S });
  return { name, profile, use, flops: 2 * S * N * K, rows };
}
function attention(name: string, profile: Profile, dtype: Dtype): Case {
  const [B, S, G, M, C] = [1, 4096, 8, 4, 128];
  const [q, k] = [B * S * G * M * C, B * S * G * C];
  const d = { B, S, U: S, G, M, C, W: C, scale: 1 / Math.sqrt(C), chunk: 0, ranks: 1 };
  const use = specFor("attention", d, { q, k, v: k, o: q, lse: B * S * G * M }, dtype);
  return { name, profile, use, flops: 2 * B * G * M * S * S * C };
}

const shape = [131072, 1536, 2048] as const;
const cases: readonly Case[] = [
  gemm("gemm f32 4096³", "baseline", "f32", [4096, 4096, 4096], "40"),
  gradient("gemm_dgrad", "gemm_dgrad f32 4096³", "baseline", "f32", 4096),
  gradient("gemm_wgrad", "gemm_wgrad f32 4096³", "baseline", "f32", 4096),
  gemm("gemm f16 4096³, no matrix units", "f16", "f16", [4096, 4096, 4096]),
  gemm("gemm f16 4096³, matrix units", "matrix", "f16", [4096, 4096, 4096], "150 (aim 250)"),
  gradient("gemm_dgrad", "gemm_dgrad f16 4096³, matrix units", "matrix", "f16", 4096),
  gradient("gemm_wgrad", "gemm_wgrad f16 4096³, matrix units", "matrix", "f16", 4096),
  gemm("gemm f16 131072×1536×2048, matrix units", "matrix", "f16", shape),
  grouped("grouped gemm f16 Qwen3-30B gate+up, 128 experts, matrix units", "matrix", "f16", [...shape, 128]),
  gemm("gemm f32 131072×1536×2048", "baseline", "f32", shape),
  grouped("grouped gemm f32 Qwen3-30B gate+up, 128 experts", "baseline", "f32", [...shape, 128]),
  attention("attention forward f32, causal, seq 4096, head 128, 32/8 heads", "baseline", "f32"),
  attention("attention forward f16, causal, seq 4096, head 128, 32/8 heads", "f16", "f16"),
];

/** Milliseconds of each case of one profile: medians over rounds in which all take turns. */
async function measure(profile: Profile, mine: readonly Case[]) {
  const gpu = await openDevice(dawn, profile, { timestamps: true });
  const { device } = gpu;
  const compileKernel = compiler(gpu);
  const bind = binder(gpu);
  const commands = commandsOn(gpu, { timed: true });
  const next = random(7);
  const pattern = Float32Array.from({ length: 1 << 20 }, next);
  const halfWords = encoded("f16", pattern).words;
  const make = (bytes: number) =>
    device.createBuffer({ size: Math.ceil(bytes / 16) * 16, usage: usage.storage | usage.copyTarget | usage.copySource });
  const filled = (elements: number, dtype: Dtype) => {
    const buffer = make(elements * bytesOf[dtype]);
    const data = dtype === "f16" ? halfWords : pattern;
    for (let at = 0; at < buffer.size; at += data.byteLength)
      device.queue.writeBuffer(buffer, at, data, 0, Math.min(data.length, (buffer.size - at) / data.BYTES_PER_ELEMENT));
    return buffer;
  };
  const milliseconds = new Map<Case, number[]>();
  const checked = new Map<Case, number>();
  for (const c of mine) {
    const made: GeneratedKernel = wgslGenerator(c.use.op)(c.use, profile);
    const launches = made.launches.map(planLaunch);
    const entries = launches.map(({ entry, args }) => ({
      ...{ entry, buffers: args.filter((a) => !isNumber(a)).length, uniform: args.some(isNumber) },
    }));
    const pipelines: readonly ComputePipeline[] = await compileKernel({ name: c.name, code: made.source, entries });
    const buffers = new Map(Object.entries(c.use.size).map(([name, n]) => [name, filled(n, c.use.dtype[name]!)]));
    if (c.rows) {
      const rows = make(c.rows.byteLength);
      device.queue.writeBuffer(rows, 0, c.rows);
      buffers.set("rows", rows);
    }
    const scratch = make(Math.max(256, made.scratch ?? 0));
    const groups = launches.map(({ args }, i) => {
      const places = args
        .filter((a) => !isNumber(a))
        .map((a) => {
          const offset = a.kind === "scratch" ? a.offset : 0;
          const buffer = a.kind === "scratch" ? scratch : buffers.get(a.kind === "operand" ? a.name : a.kind)!;
          return { buffer, offset, bytes: buffer.size - offset };
        });
      return bind(
        c.name,
        pipelines[i]!.layout,
        places,
        uniformOf(args, () => 0),
      );
    });
    const run = () => {
      for (const [i, l] of made.launches.entries())
        commands.dispatch({
          pipeline: pipelines[i]!.pipeline,
          group: groups[i]!,
          grid: l.grid,
          of: { rank: 0, id: c.name, op: c.use.op, kernel: c.use.name },
        });
    };
    // while the host fills buffers the device falls asleep, and takes its time to come to its full clock: once from 660 MHz to 1,980
    for (const begun = performance.now(); performance.now() - begun < WAKING; ) {
      for (let i = 0; i < 4; i++) run();
      await commands.finish();
      await commands.timings();
    }
    const all: number[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      run();
      await commands.finish();
      const times = await commands.timings();
      all.push((times.at(-1)!.end_us - times[0]!.begin_us) / 1e3);
    }
    milliseconds.set(c, all);
    if (c.use.op === "gemm") checked.set(c, await spotCheck(c, buffers.get("y")!));
    for (const b of [...buffers.values(), scratch]) b.destroy();
  }

  /** The largest relative error of some elements of a product, against doubles. */
  async function spotCheck(c: Case, y: GPUBuffer): Promise<number> {
    const { S, K, N } = c.use.d as Record<"S" | "K" | "N", number>;
    const dtype = c.use.dtype.x!;
    const value = (i: number) => (dtype === "f16" ? widenOne(halfWords[i % halfWords.length]!) : pattern[i % pattern.length]!);
    const [bytes] = await commands.read([{ buffer: y, offset: 0, bytes: 256 }]);
    let [error, scale] = [0, 0];
    for (let j = 0; j < 32; j++) {
      let want = 0;
      for (let k = 0; k < K; k++) want += value(k) * value(k * N + j);
      const got = dtype === "f16" ? widenOne(new Uint16Array(bytes!)[j]!) : new Float32Array(bytes!)[j]!;
      error += (got - want) ** 2;
      scale += want ** 2;
    }
    if (S < 1) throw new Error("a product of no rows");
    return Math.sqrt(error / scale);
  }
  const adapter = gpu.adapter;
  gpu.close();
  return { adapter, milliseconds, checked };
}
function widenOne(h: number): number {
  const exponent = (h >>> 10) & 31;
  const size = exponent === 0 ? (h & 1023) * 2 ** -24 : (1024 + (h & 1023)) * 2 ** (exponent - 25);
  return h & 0x8000 ? -size : size;
}
const median = (numbers: readonly number[]): number => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)]!;

/** A Mixtral-like model of four layers. */
async function compiled() {
  const job = jobOf({
    name: "webgpu-bench",
    model: {
      ...{ layers: 4, hidden: 1024, ffn: 1024, heads: 16, kv_heads: 4, head_dim: 64, vocab: 256, seq: 512 },
      moe: { experts: 8, top_k: 2, ffn: 1024, router: { balance: "aux_loss", aux_coeff: 0.01 } },
    },
    parallel: { world: 1 },
    train: { micro_batch: 4, global_batch: 8, steps: 100, precision: "fp32", optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt", tokenizer: "bytes" },
    cluster: { device: "h200-141gb" },
  });
  return compile(job, { target: await loadTarget("webgpu:baseline") });
}
type Model = Awaited<ReturnType<typeof compiled>>;

/** Its tokens per second without a profile, then where the time goes. */
async function model({ plan, sources }: Model) {
  const open = (profile: boolean) => openRun(plan, { backend: "webgpu", source: (f) => sources.get(f)!, baseDir: fixture(""), profile });
  const run = await open(false);
  const seconds: number[] = [];
  let tokens = 0;
  for (let step = 0; step < 8; step++) {
    const result = await run.step();
    tokens = result.tokens;
    if (step > 1) seconds.push(result.seconds);
  }
  await run.close();
  const timed = await open(true);
  await timed.step();
  await timed.profile();
  await timed.step();
  const rows = profileRows(plan, await timed.profile());
  await timed.close();
  const byOp = new Map<string, number>();
  for (const r of rows) byOp.set(r.op, (byOp.get(r.op) ?? 0) + r.share);
  return { tokensPerSecond: tokens / median(seconds), stepSeconds: median(seconds), byOp: [...byOp].sort((a, b) => b[1] - a[1]) };
}

/** Steps before the engine has compiled what records them, and steps that count. */
const [WARM, COUNTED] = [15, 25];

/**
 * Microseconds of this thread per dispatch of a whole step of the model as the runtime records it: the walk, host writes, commands
 * and submissions, until the last has been handed over. What is waited for comes after.
 */
async function recording({ plan, sources }: Model) {
  const localRanks = await openWebgpu(plan, { kernel: (file) => sources.get(file)! });
  const corpus = openCorpus({ path: fixture("corpus.txt") }, readingOf(plan.job));
  const milliseconds: number[] = [];
  let begun = 0;
  const timed: LocalRanks = {
    ...localRanks,
    beginStep() {
      begun = performance.now();
      return false;
    },
    finish() {
      // all is submitted when this returns; what it promises is that the device is done
      const done = localRanks.finish();
      milliseconds.push(performance.now() - begun);
      return done;
    },
  };
  try {
    const run = runOn(plan, { localRanks: timed, batch: corpus.batch });
    for (let step = 0; step < WARM + COUNTED; step++) await run.step();
  } finally {
    corpus.close();
    await localRanks.close();
  }
  const launches = new Map(plan.kernels.map((k) => [k.id, k.launches.length]));
  const program = plan.programs[0]!;
  const blocks = [...program.order.map((tag) => blockOf(program, tag)), program.step];
  const dispatches = blocks.flat().reduce((n, i) => n + (i.kind === "compute" ? launches.get(i.kernel)! : 0), 0);
  const counted = milliseconds.slice(WARM);
  const each = (ms: number): string => ((ms * 1e3) / dispatches).toFixed(2);
  return { dispatches, first: milliseconds[0]!, median: each(median(counted)), fastest: each(Math.min(...counted)) };
}

/**
 * Microseconds of this thread per dispatch, recording and submitting, while the device works: of one pipeline and bind group all
 * the time, and of four pipelines and eight bind groups in turn, as in a plan; these also with four buffers, which lie in one
 * GPUBuffer or each in its own.
 */
async function encoding() {
  const gpu = await openDevice(dawn, "baseline");
  const bind = binder(gpu);
  const commands = commandsOn(gpu, { timed: false });
  const compileKernel = compiler(gpu);
  /** Dispatches that see `seen` buffers, which lie in `of` GPUBuffers. */
  const dispatches = async (seen: number, of: number): Promise<Dispatch[]> => {
    const all = Array.from({ length: seen }, (_, i) => i);
    const declared = all.map((i) => `@group(0) @binding(${i}) var<storage, read_write> x${i}: array<f32>;`).join("\n");
    const entries = [{ entry: "one", buffers: seen, uniform: false }];
    const code = (n: number) =>
      `${declared}\n@compute @workgroup_size(1) fn one() { x0[0] = ${all.map((i) => `x${i}[0]`).join(" + ")} + ${n}.0; }`;
    const made = await Promise.all([1, 2, 3, 4].map((n) => compileKernel({ name: `one${n}`, code: code(n), entries })));
    const buffers = Array.from({ length: of }, () => gpu.device.createBuffer({ size: 256 * 8 * seen, usage: usage.storage }));
    return Array.from({ length: 8 }, (_, n) => {
      const { pipeline, layout } = made[n % 4]![0]!;
      const places = all.map((i) => ({ buffer: buffers[i % of]!, offset: 256 * (n * seen + i), bytes: 16 }));
      return { pipeline, group: bind("one", layout, places), grid: [1, 1, 1], of: { rank: 0, id: "one", op: "one", kernel: "one" } };
    });
  };
  const one = await dispatches(1, 1);
  const turns = { same: one.slice(0, 1), turns: one, shared: await dispatches(4, 1), apart: await dispatches(4, 4) };
  const times = { same: [] as number[], turns: [] as number[], shared: [] as number[], apart: [] as number[] };
  for (let round = 0; round < 9; round++)
    for (const name of ["same", "turns", "shared", "apart"] as const) {
      const mine = turns[name];
      const begun = performance.now();
      for (let n = 0; n < 4096; n++) commands.dispatch(mine[n % mine.length]!);
      times[name].push(((performance.now() - begun) * 1e3) / 4096);
      await commands.finish();
    }
  const found = { same: median(times.same), turns: median(times.turns), shared: median(times.shared), apart: median(times.apart) };
  gpu.close();
  return found;
}

const profiles = [...new Set(cases.map((c) => c.profile))];
const rows: string[][] = [];
let adapter = "";
for (const profile of profiles) {
  const mine = cases.filter((c) => c.profile === profile);
  try {
    const found = await measure(profile, mine);
    adapter = found.adapter;
    for (const c of mine) {
      const ms = median(found.milliseconds.get(c)!);
      const error = found.checked.get(c);
      rows.push([c.name, ms.toFixed(3), (c.flops / ms / 1e9).toFixed(1), c.floor ?? "", error === undefined ? "" : error.toExponential(1)]);
    }
  } catch (error) {
    rows.push([`profile ${profile}`, "", "", "", `failed: ${(error as Error).message.split("\n")[0]}`]);
  }
}
const encode = await encoding();
const built = await compiled();
const record = await recording(built);
const whole = await model(built);
const date = new Date().toISOString().slice(0, 10);
const text = `# WebGPU bench

${date}, ${adapter}, Node ${process.version}. \`npm run bench:webgpu\`. Medians of ${ROUNDS} rounds, device timestamps, random data.

| kernel | ms | TFLOP/s | floor | relative error |
|---|---|---|---|---|
${rows.map((r) => `| ${r.join(" | ")} |`).join("\n")}

Recording and submitting costs the host, a dispatch, ${encode.same.toFixed(2)} µs where pipeline and bind group stay (at most 4 wanted), ${encode.turns.toFixed(2)} µs where
both change every time (4,096 dispatches of one buffer, median of 9). With four buffers where both change: ${encode.shared.toFixed(2)} µs in one GPUBuffer,
${encode.apart.toFixed(2)} µs in one each.

A step of the model below as the runtime records it: ${record.median} µs of the host a dispatch, encoded and submitted (at most 4 wanted);
${record.fastest} in the fastest step (${record.dispatches} dispatches, ${COUNTED} steps after ${WARM}). The first step takes ${record.first.toFixed(0)} ms: bind groups are made.

Mixtral-like model, 4 layers, hidden 1024, 8 experts of 1024, top 2, seq 512, 8 sequences a step, fp32, one rank:
${Math.round(whole.tokensPerSecond).toLocaleString("en-US")} tokens/s, ${(whole.stepSeconds * 1e3).toFixed(1)} ms a step. Share of the device's time by op:

| op | share |
|---|---|
${whole.byOp.map(([op, share]) => `| ${op} | ${(100 * share).toFixed(1)} % |`).join("\n")}
`;
const folder = process.env.RANKC_RESULTS ?? join(root, "test/results");
mkdirSync(folder, { recursive: true });
writeFileSync(join(folder, `webgpu-${date}.md`), text);
process.stdout.write(text);
