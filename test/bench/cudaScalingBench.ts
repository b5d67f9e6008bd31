/**
 * Layers of Mixtral-8x7B's shape on one GPU and on meshes of two, with communication in order and beside compute: tokens/s per GPU, the share
 * of linear scaling, exposed communication, and memory beside the plan's peak. On a machine with two GPUs:
 *
 *     npm run bench:cuda-host [-- --steps 10] [--only "data 2"] [--out FOLDER] [--job JOB]
 *
 * Every rank has 2 x 4096 tokens a microbatch, of random ids. A mesh is compared with one GPU that does as many microbatches. The step is the
 * median of steps that are replayed as a graph; communication is that of one step whose instructions are timed. Writes FOLDER/scaling.md, the
 * profile of each mesh as a trace (FOLDER/NAME.trace.json; NAME.trace.json.gz is that of rank 0, small enough to be kept), how much longer kernels
 * take beside communication than on one GPU, and FOLDER/link.json, a device profile with the measured links, which the column
 * "estimate" uses. Exits 1 if a run fails.
 */
import { spawn, spawnSync } from "node:child_process";
import { appendFileSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { gzipSync } from "node:zlib";
import { parse, stringify } from "yaml";
import type { Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { root } from "../support/checkout.ts";
import { random } from "../support/opCases.ts";
import { besideRows, besideTable, exposedTime, prunedTrace, type Slice, slicesOf } from "./traceTables.ts";

const { values } = parseArgs({
  options: {
    steps: { type: "string", default: "10" },
    job: { type: "string", default: join(root, "test/bench/jobs/mixtral-8x7b-4-layers.yaml") },
    backend: { type: "string", default: "cuda" },
    only: { type: "string", multiple: true, default: [] },
    out: { type: "string", default: join(root, ".rankc/scaling") },
  },
});
const [folder, steps] = [resolve(values.out), Number(values.steps)];
/** The command line: RANKC is the command of an installed or packed one. */
const [command = "node", ...commandArguments] = (process.env.RANKC ?? `${process.execPath} ${join(root, "dist/cli/rankc.cjs")}`).split(" ");
const base = parse(readFileSync(values.job, "utf8"));

interface Mesh {
  readonly parallel: object;
  /** Sequences a microbatch has, over ranks that share it. */
  readonly micro?: number;
  readonly batch: number;
  /** Further keys of train. */
  readonly train?: object;
  /** The mesh of one GPU that does as many microbatches. */
  readonly alone: string;
  /** The least share of linear scaling that is aimed at. */
  readonly goal?: number;
}
const [one, eight, bf16] = ["one GPU", "one GPU, 8 microbatches", "one GPU, gradients in bf16"];
const data = { world: 2, distributed_optimizer: true };
const tensor = { world: 2, tensor: 2, sequence: true };
const pipeline = { world: 2, pipeline: 2 };
const buckets = { gradient_bucket: 256, parameter_bucket: 256 };
const forward = { ...data, ...buckets, parameter_gather: "forward" };
const meshes: Readonly<Record<string, Mesh>> = {
  [one]: { parallel: { world: 1 }, batch: 2, alone: one },
  "expert 2": { parallel: { world: 2, expert: 2 }, batch: 4, alone: one },
  "expert 2, overlap": {
    parallel: { world: 2, expert: 2, gradient_bucket: 256, expert_overlap: "shared" },
    batch: 4,
    alone: one,
    goal: 0.95,
  },
  "data 2": { parallel: data, batch: 4, alone: one },
  "data 2, overlap": { parallel: { ...data, ...buckets }, batch: 4, alone: one },
  "data 2, overlap, 16 multiprocessors": { parallel: { ...data, ...buckets, communication_sms: 16 }, batch: 4, alone: one },
  "data 2, overlap, 8 multiprocessors": { parallel: { ...data, ...buckets, communication_sms: 8 }, batch: 4, alone: one },
  "data 2, overlap, 16 multiprocessors, gathered in forward": {
    ...{ parallel: { ...data, ...buckets, parameter_gather: "forward", communication_sms: 16 }, batch: 4, alone: one },
  },
  "data 2, overlap, 16 multiprocessors, gathered in forward, sums in bf16": {
    ...{ parallel: { ...forward, communication_sms: 16 }, train: { gradient_reduction: "bf16" }, batch: 4, alone: one, goal: 0.95 },
  },
  "data 2, overlap, gathered in forward, sums in bf16": {
    ...{ parallel: forward, train: { gradient_reduction: "bf16" }, batch: 4, alone: one, goal: 0.95 },
  },
  [bf16]: { parallel: { world: 1 }, train: { gradients: "bf16" }, batch: 2, alone: bf16 },
  "data 2, overlap, gathered in forward, gradients in bf16": {
    ...{ parallel: forward, train: { gradients: "bf16" }, batch: 4, alone: bf16, goal: 0.95 },
  },
  "data 2, overlap, 16 multiprocessors, gathered in forward, gradients in bf16": {
    ...{ parallel: { ...forward, communication_sms: 16 }, train: { gradients: "bf16" }, batch: 4, alone: bf16, goal: 0.95 },
  },
  "tensor 2, expert 2": { parallel: { ...tensor, expert: 2 }, micro: 4, batch: 4, alone: one, goal: 0.85 },
  "tensor 2, expert 2, overlap": {
    parallel: { ...tensor, expert: 2, tensor_overlap: "backward", gradient_bucket: 256 },
    ...{ micro: 4, batch: 4, alone: one, goal: 0.85 },
  },
  [eight]: { parallel: { world: 1 }, batch: 16, alone: eight },
  "pipeline 2, zero-bubble, 8 microbatches": { parallel: { ...pipeline, schedule: "zero_bubble" }, batch: 16, alone: eight, goal: 0.9 },
  "pipeline 2, two chunks, zero-bubble, 8 microbatches": {
    parallel: { ...pipeline, virtual_pipeline: 2, schedule: "zero_bubble" },
    ...{ batch: 16, alone: eight, goal: 0.9 },
  },
  "pipeline 2, two chunks, 8 microbatches": { parallel: { ...pipeline, virtual_pipeline: 2 }, batch: 16, alone: eight, goal: 0.9 },
  "pipeline 2, 8 microbatches": { parallel: pipeline, batch: 16, alone: eight },
  "data 2, 8 microbatches, overlap": { parallel: { ...data, ...buckets }, batch: 32, alone: eight, goal: 0.95 },
  "context 2, ring": { parallel: { world: 2, context: 2, context_method: "ring", expert: 2 }, micro: 4, batch: 4, alone: one },
  "tensor 2, expert_tensor 2": { parallel: { ...tensor, expert_tensor: 2 }, micro: 4, batch: 4, alone: one, goal: 0.85 },
};
const chosen = Object.entries(meshes).filter(
  ([name]) =>
    values.only.length === 0 ||
    values.only.some((part) => name.includes(part)) ||
    // the mesh of one GPU that a chosen mesh is compared with
    Object.entries(meshes).some(([other, m]) => m.alone === name && values.only.some((part) => other.includes(part))),
);
const fileOf = (name: string): string => join(folder, name.replaceAll(/[^a-z0-9]+/gi, "-"));

/** Runs the command line. Returns the exit code and the output; all output goes to LOG as well. */
function rankc(log: string, ...args: readonly string[]): Promise<{ readonly exit: number | null; readonly out: string }> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, [...commandArguments, ...args], { cwd: folder, env: { ...process.env, NCCL_NVLS_ENABLE: "0" } });
    const write = (text: Buffer): void => appendFileSync(log, text);
    let out = "";
    child.stdout.on("data", (text) => {
      out += text;
      write(text);
    });
    child.stderr.on("data", write);
    child.on("error", reject);
    child.on("close", (exit) => resolve({ exit, out }));
  });
}

/** Writes ids that fill every batch of a run. */
function writeIds(sequences: number): void {
  const next = random(7);
  const ids = Uint16Array.from({ length: sequences * (base.model.seq + 1) }, () => Math.floor(((next() + 1) / 2) * base.model.vocab));
  writeFileSync(join(folder, "ids.bin"), ids);
}

/** The most MiB in use on a GPU while `work` runs. */
async function memoryDuring<T>(work: Promise<T>): Promise<{ readonly result: T; readonly mib: number }> {
  const query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "200"];
  const watch = spawn("nvidia-smi", query);
  // without the tool nothing is measured
  watch.on("error", () => {});
  let mib = 0;
  watch.stdout.on("data", (text) => {
    for (const line of String(text).trim().split("\n")) mib = Math.max(mib, Number(line) || 0);
  });
  const result = await work;
  watch.kill();
  return { result, mib };
}

const median = (all: readonly number[]): number => [...all].sort((a, b) => a - b)[Math.floor(all.length / 2)] ?? Number.NaN;
const faults: string[] = [];

/** Trains a mesh. Returns what was measured, or undefined where a run failed. */
async function measure(name: string, mesh: Mesh) {
  const [at, log] = [fileOf(name), `${fileOf(name)}.log`];
  const all = ["--backend", values.backend, "--data-dir", folder];
  const { result, mib } = await memoryDuring(rankc(log, "run", at, ...all, "--steps", String(steps + 4), "--metrics", `${at}.jsonl`));
  const profiled = result.exit === 0 ? await rankc(log, "run", at, ...all, "--steps", "3", "--profile", `${at}.trace.json`) : result;
  if (result.exit !== 0 || profiled.exit !== 0) {
    faults.push(`${name}: exit ${result.exit}, with --profile ${profiled.exit}: ${readFileSync(log, "utf8").slice(-1500)}`);
    return undefined;
  }
  const lines = readFileSync(`${at}.jsonl`, "utf8")
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line));
  const rows = lines.filter((line) => line.loss !== undefined);
  const plan: Plan = JSON.parse(readFileSync(join(at, "plan.json"), "utf8"));
  const seconds = median(rows.slice(4).map((r) => r.seconds));
  const moves = new Set(plan.programs.flatMap(instructionsOf).flatMap((i) => (i.kind === "compute" ? [] : [i.id])));
  const trace = readFileSync(`${at}.trace.json`, "utf8");
  writeFileSync(`${at}.trace.json.gz`, gzipSync(prunedTrace(trace), { level: 9 }));
  const slices = slicesOf(trace);
  const [communication, kernels] = [slices.filter((s) => moves.has(s.name)), slices.filter((s) => !moves.has(s.name))];
  const { busy, alone } = exposedTime(communication, kernels);
  const estimated = existsSync(profile) ? await rankc(log, "inspect", at, "--time", "--device", profile, "--format", "json") : undefined;
  return {
    ...{ seconds, mib, losses: rows.map((r) => r.loss as number) },
    ...{ busy: busy / 1e3, alone: alone / 1e3, communication, kernels },
    perGpu: (mesh.batch * base.model.seq) / seconds / plan.mesh.world,
    peak: Math.max(...plan.memory.map((m) => m.peak)) / 2 ** 20,
    estimate: estimated?.exit === 0 ? JSON.parse(estimated.out).estimate?.seconds : undefined,
  };
}

rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });
writeIds(32 * (steps + 8));
const compiled = await Promise.all(
  chosen.map(async ([name, { parallel, micro = 2, batch, train: more }]) => {
    const train = { ...base.train, micro_batch: micro, global_batch: batch, optimizer: { type: "adamw", lr: 1e-6 }, ...more };
    const job = { ...base, name: "scaling", parallel, train, data: { path: "ids.bin" } };
    writeFileSync(`${fileOf(name)}.yaml`, stringify(job));
    const { exit } = await rankc(
      `${fileOf(name)}.log`,
      "compile",
      `${fileOf(name)}.yaml`,
      "--target",
      "cuda:sm_90a",
      "--no-cubins",
      "-o",
      fileOf(name),
    );
    if (exit !== 0) faults.push(`${name}: compile exited with ${exit}: ${readFileSync(`${fileOf(name)}.log`, "utf8").slice(-1500)}`);
    return exit === 0;
  }),
);
/** Links: exchanges of rows and sums from one mesh, then reductions and gathers of many sizes from the other. */
const profile = join(folder, "link.json");
for (const name of ["expert 2", "data 2"])
  if (chosen.some(([other]) => other === name)) {
    const known = existsSync(profile) ? ["--base", profile] : [];
    await rankc(
      join(folder, "calibrate.log"),
      "calibrate",
      fileOf(name),
      "--backend",
      values.backend,
      "--seconds",
      "15",
      ...known,
      "-o",
      profile,
    );
  }

const gpus =
  spawnSync("nvidia-smi", ["--query-gpu=name,driver_version", "--format=csv,noheader"], { encoding: "utf8" }).stdout?.trim() ?? "";
const table = [
  "| mesh | ms a step | tokens/s per GPU | of linear | goal | communication, ms | exposed, ms | memory in use, MiB | plan's peak, MiB | estimate, ms |",
  "|---|---|---|---|---|---|---|---|---|---|",
];
const besides: string[] = [];
/** Writes the report of what is measured so far. */
function report(): void {
  const text = [
    "# Scaling on two GPUs",
    "",
    `${new Date().toISOString().slice(0, 10)}; ${gpus.replaceAll("\n", "; ")}. \`npm run bench:cuda-host\`: four layers of Mixtral-8x7B's shape, bf16, AdamW, 2 x 4096 tokens a rank and microbatch.`,
    ...["", ...table, ""],
    ...(besides.length ? ["## Kernels beside communication", "", ...besides] : []),
    ...(faults.length ? ["Failed:", "", ...faults, ""] : []),
  ].join("\n");
  writeFileSync(join(folder, "scaling.md"), text);
}
const speeds = new Map<string, number>();
const kernelsOf = new Map<string, readonly Slice[]>();
for (const [n, [name, mesh]] of chosen.entries()) {
  const got = compiled[n] ? await measure(name, mesh) : undefined;
  if (!got) continue;
  speeds.set(name, got.perGpu);
  kernelsOf.set(name, got.kernels);
  const share = got.perGpu / (speeds.get(mesh.alone) ?? Number.NaN);
  const cells = [
    ...[name, (1e3 * got.seconds).toFixed(1), got.perGpu.toFixed(0), share.toFixed(3), mesh.goal?.toFixed(2) ?? ""],
    ...[got.busy.toFixed(1), got.alone.toFixed(1), String(got.mib), got.peak.toFixed(0)],
    got.estimate === undefined ? "" : (1e3 * got.estimate).toFixed(1),
  ];
  table.push(`| ${cells.join(" | ")} |`);
  const ofOne = kernelsOf.get(mesh.alone);
  if (name !== mesh.alone && ofOne)
    besides.push(`### ${name}`, "", ...besideTable(besideRows(got.kernels, got.communication, ofOne).slice(0, 12)), "");
  console.log(table.at(-1));
  report();
}
report();
for (const fault of faults) console.error(fault);
if (faults.length) process.exitCode = 1;
