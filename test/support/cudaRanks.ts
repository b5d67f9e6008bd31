/** Ranks on the stand-ins: opens all ranks of a plan in this process, runs a step of them, and makes small plans for them. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, vi } from "vitest";
import type { CudaRanks } from "../../runtime/cuda/backend.ts";
import type { Collective, CollectiveKind, Compute, Kernel, Plan } from "../../schemas/plan.ts";
import { startOf } from "../../src/codegen/launchArgs.ts";
import { cpu } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { asCuda, bytesAt, imagesOf, noCompiler, standIn, withCubins } from "./cudaStandIn.ts";
import { type Hand, handPlan } from "./handPlan.ts";
import { jobOf, meshOf } from "./job.ts";
import { stepTogether } from "./steps.ts";

export type Settings = Partial<Parameters<Awaited<ReturnType<typeof standIn>>["openCuda"]>[1]>;
export type Ranks = Awaited<ReturnType<typeof standInRanks>>;

export async function standInRanks(how: Parameters<typeof standIn>[0] = {}) {
  const cuda = await standIn(how);

  /** Opens all ranks of a plan, each as local ranks of its own. */
  async function openAll(compiled: Plan, settings: Settings = {}): Promise<CudaRanks[]> {
    const plan = withCubins(compiled);
    let id: Uint8Array | undefined;
    const share = async (_: string, members: readonly number[], make: () => Uint8Array) => {
      expect(members.length).toBe(plan.mesh.world);
      return (id ??= make());
    };
    const ranks = Array.from({ length: plan.mesh.world }, (_, r) => r);
    const signal = AbortSignal.timeout(3_600_000);
    return Promise.all(ranks.map((rank) => cuda.openCuda(plan, { rank, device: rank, files: imagesOf(plan), share, signal, ...settings })));
  }

  /** One step of all ranks; what a kernel threw is thrown. */
  async function step(...all: Parameters<typeof stepTogether>): Promise<boolean[]> {
    const replayed = await stepTogether(...all);
    const complaint = cuda.complaint();
    if (complaint) throw complaint;
    return replayed;
  }

  return { ...cuda, openAll, step };
}

/**
 * Opens the stand-ins before the tests of a file, and makes a folder that is removed after them. `open` opens all ranks of a plan with the kernels of the
 * CPU.
 */
export function standInWithFolder(prefix: string) {
  const folder = mkdtempSync(join(tmpdir(), prefix));
  let ranks: Ranks | undefined;
  beforeAll(async () => {
    if (!noCompiler) ranks = await standInRanks();
  });
  afterAll(() => {
    rmSync(folder, { recursive: true, force: true });
    vi.unstubAllEnvs();
  });
  const cuda = (): Ranks => ranks ?? expect.fail("the stand-ins are not open");
  return {
    folder,
    /** What a kernel threw. */
    complaint: () => cuda().complaint(),
    async open(compiled: Plan): Promise<{ readonly plan: Plan; readonly all: CudaRanks[] }> {
      // a file has the operands of an instruction in another order, and ranks of a launch read their plan from one
      const { plan, kernels } = asCuda(parsePlan(printPlan(compiled), "plan.json"));
      cuda().serve(kernels);
      return { plan, all: await cuda().openAll(plan) };
    },
  };
}

const model = { layers: 2, hidden: 16, ffn: 24, heads: 4, kv_heads: 2, head_dim: 4, vocab: 256, seq: 8 };
export const moe = { experts: 4, top_k: 2, ffn: 8, router: { normalize_top_k: true, balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 } };
export const planOf = (placed: object, over: object = {}, train: object = {}): Plan =>
  compile(
    jobOf({
      name: "stand-in",
      model: { ...model, ...over },
      ...meshOf(placed),
      train: { micro_batch: 1, global_batch: 8, steps: 4, precision: "fp32", init: { std: 0.2 }, optimizer: { lr: 1e-2 }, ...train },
      data: { path: "corpus.txt" },
    }),
    { target: { ...cpu, writesFirst: true } },
  ).plan;

export const moveOf = (how: CollectiveKind, from: string, to: string, more: Partial<Collective> = {}): Collective => ({
  ...{ kind: "collective", id: `${to}.${how}`, how, name: how, axes: "dp", subAxes: [0], from, to, bytes: 0 },
  why: { op: "", because: "", path: "" },
  ...more,
});
export const at = { tag: "F0", microbatch: 0, copy: 0 };

export const launchOf = (id: string): Kernel => ({
  ...{ id, op: "add", dtypes: "f32", sizes: {}, attrs: {}, uses: 1, scratch: 0 },
  source: { file: `${id}.cu`, sha256: "0".repeat(64) },
  launches: [{ entry: id, grid: [1, 1, 1], threads: 1, shared: 0, args: [{ kind: "operand", name: "y" }, startOf("S")] }],
});
export const runs = (kernel: string, y: string): Compute => ({
  ...{ kind: "compute", id: `${kernel} ${y}`, op: "add", kernel, reads: {}, writes: { y }, dims: { S: [8, [0]] }, attrs: {} },
});
/** put writes the rank's start, spoil what no one may see. */
export const putAndSpoil = {
  put: (params: DataView) => new Float32Array(bytesAt(params.getBigUint64(0, true), 4)).fill(100 + params.getInt32(8, true)),
  spoil: (params: DataView) => new Float32Array(bytesAt(params.getBigUint64(0, true), 4)).fill(-1e6),
};
export const small = { x: { shape: [1] }, y: { shape: [1] }, z: { shape: [1] } };

/** One rank, or more, each with buffers x and y of one value, and kernels put and spoil. */
export const handOf = (over: Partial<Hand>): Plan =>
  handPlan({ target: "cuda:sm_90a", buffers: small, kernels: ["put", "spoil"].map(launchOf), ...over });
export const failure = (promise: Promise<unknown>): Promise<Error> =>
  promise.then(
    () => expect.fail("nothing was thrown"),
    (error) => error,
  );
