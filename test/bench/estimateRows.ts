/** The published rows of test/fixtures/estimate as jobs of rankc, and their estimates. */
import { readFileSync } from "node:fs";
import { parse, stringify } from "yaml";
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { type Estimate, type EstimateOptions, estimate } from "../../src/analysis/estimate/estimate.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import type { Assumptions } from "../../src/analysis/estimate/timedBlocks.ts";
import { loadDeviceTargets, type Target } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";

const fixture = (name: string): string => readFileSync(new URL(`../fixtures/estimate/${name}`, import.meta.url), "utf8");

/** A published row: keys as the head of rows.tsv. */
export type PublishedRow = Readonly<Record<string, string>>;

/** Reads a table of tabs. */
export function readTable(name: string): PublishedRow[] {
  const [head = "", ...lines] = fixture(name).trimEnd().split("\n");
  const keys = head.split("\t");
  return lines.map((line) => Object.fromEntries(line.split("\t").map((cell, i) => [keys[i] ?? "", cell])));
}

const deviceOfRow = ({ device }: PublishedRow): string =>
  ({ H100: "h100-80gb", H200: "h200-141gb", B200: "b200-192gb" })[device ?? ""] ?? "";

const models: Readonly<Record<string, object>> = parse(fixture("models.yaml"));

/** The job of a row. Rows of experts have no room beyond an even load: the published stacks send the rows that exist. */
function jobText(row: PublishedRow): string {
  const n = (key: string): number => Number(row[key]);
  const model = models[row.model ?? ""] as { readonly moe?: object; readonly layers: number };
  const recompute = row.recompute === "none" ? {} : { recompute: { mode: "selective", modules: row.recompute?.split(", ") } };
  return stringify({
    name: row.id,
    model: { ...model, seq: n("seq"), ...(model.moe && { moe: { ...model.moe, rows_bound: 1, router: { precision: "fp32" } } }) },
    parallel: {
      ...{ world: n("gpus"), tensor: n("tp"), sequence: n("tp") > 1, pipeline: n("pp"), virtual_pipeline: n("vpp"), context: n("cp") },
      ...(model.moe ? { expert: n("ep"), expert_tensor: n("etp") } : {}),
      ...(row.layout === "-" ? {} : { layout: row.layout }),
      distributed_optimizer: true,
    },
    train: {
      ...{ micro_batch: n("mbs"), global_batch: n("gbs"), steps: 1, precision: "bf16", ...recompute },
      ...(row.state === "bf16" || row.state === "bf16 gradients" ? { gradients: "bf16" } : {}),
      optimizer: { lr: 1e-4, ...(row.state === "bf16" ? { moments: "bf16" } : {}) },
    },
    data: { path: "corpus.txt", tokenizer: "bytes" },
    cluster: { device: deviceOfRow(row) },
  });
}

/** Returns the target of the plans of other software. Its fusions are those with which the constants of the stacks were fitted: later ones are rankc's alone. */
export const stackTarget = async ({ cluster }: Pick<Job, "cluster">): Promise<Target> => ({
  ...(await loadDeviceTargets())(cluster.device),
  fuses: ["statistics", "sums", "activations"],
});

const plans = new Map<string, Plan>();

/** Returns the job of a row. Throws with the findings of a job that rankc refuses. */
export function jobOfRow(row: PublishedRow): Job {
  const { job, findings } = readJob(jobText(row), `${row.id}.yaml`);
  if (!job) throw new Error(`${row.id}: ${findings.map(({ code, found }) => `${code} ${found}`).join("; ")}`);
  return job;
}

/** Compiles the job of a row, once for equal jobs. Throws with the findings of a job that rankc refuses. */
export async function planOfRow(row: PublishedRow): Promise<Plan> {
  const key = jobText(row).replace(/^name:.*$/m, "");
  const known = plans.get(key);
  if (known) return known;
  const job = jobOfRow(row);
  const { plan } = compile(job, { target: await stackTarget(job) });
  plans.set(key, plan);
  return plan;
}

const peaks = new Map<string, number>();

/**
 * Returns the bytes that Megatron allocates on the rank with the most memory. Its kernels are not rankc's: nothing is fused, so the plan is that of
 * the target cpu. Its loss has logits in bf16 and in f32 at once, and the head's weight gradient is a bf16 value of its own beside the gradient of
 * the logits, before it is added to the f32 one; rankc needs neither.
 */
export function memoryOfRow(row: PublishedRow): number {
  const key = jobText(row).replace(/^name:.*$/m, "");
  const known = peaks.get(key);
  if (known !== undefined) return known;
  const job = jobOfRow(row);
  const { tensor, context } = job.parallel;
  const { hidden, seq, vocab } = job.model;
  const logits = (job.train.micro_batch * seq * vocab) / (context * tensor);
  const ofHead = Math.max((2 + 4) * logits, 2 * logits + (2 * vocab * hidden) / tensor);
  const { memory } = compile(job).plan;
  const stages = memory.map(({ peak, workspace }, stage) =>
    stage === memory.length - 1 ? peak - workspace + Math.max(workspace, ofHead) : peak,
  );
  const bytes = Math.max(...stages);
  peaks.set(key, bytes);
  return bytes;
}

/** The profile of the device and stack of a row, and what the stack does and a plan does not say. */
export function stackOfRow(row: PublishedRow): Pick<EstimateOptions, "profile"> & { readonly assumed: Assumptions } {
  const name = `${deviceOfRow(row)}.${row.stack}`;
  const profile = packageProfile(name);
  if (!profile) throw new Error(`there is no profile ${name}`);
  const hidden = (["experts", "data", "tensor"] as const).filter((what) => row.hidden?.split(" ").includes(what));
  return {
    profile,
    assumed: {
      // DeepEP and HybridEP need no count on the host, which runs ahead; the all-to-all of Megatron waits for one in each layer
      ...{ sendsPerNode: row.dispatcher === "per_node", runsAhead: row.dispatcher === "per_node" },
      ...{ captured: row.graphs === "yes", hidden },
    },
  };
}

/** Estimates a row by the profile of its device and stack. */
export const estimateRow = async (row: PublishedRow): Promise<Estimate> => estimate(await planOfRow(row), stackOfRow(row));
