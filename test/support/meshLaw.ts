import { expect } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import type { Choice } from "../../src/passes/sharding/dimChoice.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { byPosition, distance, fixture, jobOf } from "./job.ts";
import { routerChoices } from "./routerChoices.ts";
import { isFull } from "./tiers.ts";

export type Parallel = Partial<Job["parallel"]>;

/** Returns the losses, gradients and parameters with a rule of their own of two steps; the second step has the update of the first. */
export async function numbers(job: Job, pick?: (votes: readonly Choice[]) => Choice | undefined) {
  // a file has the operands of an instruction in another order
  const plan = parsePlan(printPlan(compile(job, pick ? { pick } : {}).plan), "plan.json");
  const routers = routerChoices(plan);
  const run = await openRun(plan, { baseDir: fixture(""), watch: routers });
  /** What each router chose in a step, and what a capacity kept of it, microbatch after microbatch. */
  const chosen = async () =>
    Promise.all(routers.map(async (id) => Float32Array.from((await run.watched(id)).flatMap((t) => [...byPosition(t, job)]))));
  const first = await run.step({ detailed: true });
  const choices = [await chosen()];
  const gradients = await run.gradients();
  const second = await run.step({ detailed: true });
  choices.push(await chosen());
  const learnt = [...(await run.parameters())].filter(([name]) => !gradients.has(name));
  await run.close();
  return { steps: [first, second], routers, choices, gradients, learnt };
}
export type Numbers = Awaited<ReturnType<typeof numbers>>;

/** The numbers of a job that other meshes are compared with: computed once. */
export function reference(job: object): Promise<Numbers> {
  const key = JSON.stringify(job);
  const known = references.get(key) ?? numbers(jobOf(job));
  references.set(key, known);
  return known;
}
export const references = new Map<string, Promise<Numbers>>();

/**
 * How many of the first `most` steps routers begin alike. A choice between equals is a matter of rounding, and what follows from another choice is another
 * model: so where a few tokens go elsewhere, only what came before is compared. A wrong router sends many elsewhere. A capacity chooses,
 * too: of two tokens whose weights differ in the last bits, it drops one.
 */
function alike(got: Numbers, want: Numbers, most: number): number {
  const at = want.choices.slice(0, most).findIndex((layers, step) => layers.some((c, i) => differing(c, got.choices[step]![i]!) > 0));
  if (at < 0) return most;
  const [first] = want.choices[at]!.map((c, i) => differing(c, got.choices[at]![i]!)).filter((n) => n > 0);
  expect(first, `choices that differ in step ${at}`).toBeLessThanOrEqual(8);
  return at;
}
const differing = (a: Float32Array, b: Float32Array): number => a.reduce((n, x, i) => n + Number(x !== b[i]), 0);

/**
 * Compares; returns how many of the two steps could be. With `reduction` bf16, gradients of the first step are compared alone: an update
 * divides a gradient by its own size, so that the sign of a small one, which is rounding, would move its weight by all of lr. Routers of the second step then choose among other
 * scores: logits of the first layer are up to 0.07 apart.
 */
export function sameSoFar(got: Numbers, want: Numbers, reduction: Job["train"]["gradient_reduction"] = "f32"): number {
  const steps = alike(got, want, reduction === "bf16" ? 1 : 2);
  const bound = tolerances[reduction];
  for (const [i, { loss, mtp_loss, mtp_losses, aux_loss, grad_norm, parameter_norm, router_entropy }] of want.steps
    .slice(0, steps)
    .entries()) {
    const other = got.steps[i]!;
    expect(Math.abs(other.loss - loss), `loss of step ${i}`).toBeLessThan(1e-4 * Math.max(1, loss));
    expect(other.mtp_loss === undefined).toBe(mtp_loss === undefined);
    expect(Math.abs((other.mtp_loss ?? 0) - (mtp_loss ?? 0)), `loss of further tokens of step ${i}`).toBeLessThan(1e-4 * Math.max(1, loss));
    expect(Math.abs(other.aux_loss - aux_loss), `balancing loss of step ${i}`).toBeLessThan(1e-4 * Math.max(1, aux_loss));
    expect(Math.abs(other.grad_norm / grad_norm - 1), `norm of step ${i}`).toBeLessThan(bound);
    expect(Math.abs(other.parameter_norm! / parameter_norm! - 1), `norm of the weights after step ${i}`).toBeLessThan(bound / 10);
    expect(other.router_entropy === undefined).toBe(router_entropy === undefined);
    expect(Math.abs((other.router_entropy ?? 0) - (router_entropy ?? 0)), `router entropy of step ${i}`).toBeLessThan(1e-4);
    for (const [k, depth] of mtp_losses?.entries() ?? [])
      expect(Math.abs(other.mtp_losses![k]! - depth), `loss of depth ${k + 1} of step ${i}`).toBeLessThan(1e-4 * Math.max(1, loss));
  }
  const tensors = ({ gradients, learnt }: Numbers) => new Map([...(steps > 0 ? gradients : []), ...(steps > 1 ? learnt : [])]);
  const [ours, theirs] = [tensors(got), tensors(want)];
  expect([...ours.keys()].sort()).toEqual([...theirs.keys()].sort());
  for (const [name, t] of theirs) expect(distance(ours.get(name)!.data, t.data), name).toBeLessThan(bound);
  return steps;
}
/**
 * The largest relative distance of norms and tensors. bf16: each rank rounds its sum, and the sum over ranks is rounded once for each
 * collective that it takes, by 2^-9 of an element at most; sums of ranks whose gradients cancel in part are larger than what is left.
 */
const tolerances = { f32: 1e-4, bf16: 2 ** -5 };
export const same = (got: Numbers, want: Numbers): void => expect(sameSoFar(got, want), "steps in which routers choose alike").toBe(2);
/** Over many random jobs: few may end early. */
export const enough = (steps: readonly number[]): void =>
  expect(steps.filter((n) => n < 2).length, "runs that a choice between equals ended").toBeLessThanOrEqual(2 + steps.length / 10);

export const moe = {
  experts: 8,
  top_k: 2,
  ffn: 16,
  router: { normalize_top_k: true, balance: "aux_loss", aux_coeff: 0.05, z_coeff: 0.01 },
};
export const latent = { kv_rank: 12, nope_dim: 6, rope_dim: 4, v_dim: 5 };
export const llama3 = { type: "llama3", factor: 4, original_seq: 8 };
export const yarn = { type: "yarn", factor: 4, original_seq: 8, beta_fast: 4, mscale: 1, mscale_all_dim: 0.8 };
export const shape = (over: object = {}) => ({
  layers: 2,
  hidden: 32,
  ffn: 48,
  heads: 8,
  kv_heads: 4,
  head_dim: 8,
  vocab: 256,
  seq: 16,
  ...over,
});
/** Sizes that thirds and halves divide: grids whose strides do not nest have both. */
export const thirds = { hidden: 36, heads: 12, kv_heads: 6, vocab: 258, seq: 24 };
export const moeOfThirds = { ...moe, experts: 6, ffn: 24 };
/** A gradient that is rounding alone, 5e-9 where few tokens have labels, would move its weight by all of lr with an eps of 1e-8. */
export const adamw = { lr: 1e-2, eps: 1e-6 };
/** Sequences in a step: one for each of 8 data ranks, in the full tier two, so that also those ranks accumulate gradients. */
const SEQUENCES = isFull ? 16 : 8;
export const text = (model: object, parallel: Parallel, train: object = {}, data: object = {}) => ({
  name: "law",
  model,
  parallel,
  train: {
    ...{ micro_batch: 1, global_batch: SEQUENCES, steps: 2, precision: "fp32", init: { std: 0.2 } },
    metrics: { parameter_norm: true, router_entropy: true },
    optimizer: adamw,
    ...train,
  },
  // where the text begins, sequences are one letter over and over: equals, among which rounding would choose
  data: { path: "corpus.txt", tokenizer: "bytes", order: "shuffled", ...data },
});
