/** Compares the gradients of a run with measured slopes of its loss: moves one parameter after the other along its own gradient. */
import { resolve } from "node:path";
import { openCpu } from "../../runtime/cpu/backend.ts";
import { openCorpus } from "../../runtime/data/corpus.ts";
import { learntOf } from "../../runtime/train/feed.ts";
import { readingOf } from "../../runtime/train/inputs.ts";
import { runOn, type StepResult, type Tensor } from "../../runtime/train/loop.ts";
import type { Job } from "../../schemas/job.ts";
import type { Plan } from "../../schemas/plan.ts";
import { compile } from "../../src/compile.ts";
import { fixture } from "./job.ts";
import { routerChoices } from "./routerChoices.ts";

export type Weights = ReadonlyMap<string, Tensor>;

const plans = new WeakMap<Job, Plan>();
/** The plan of a job; compiled once for each job object. */
function planOf(job: Job): Plan {
  const plan = plans.get(job) ?? compile(job).plan;
  plans.set(job, plan);
  return plan;
}

/** The first step from these weights, or from those of the job's seed; `weights` are as they were before it. */
export async function firstStep(job: Job, weights?: Weights, watch: readonly string[] = []) {
  const plan = planOf(job);
  const { path, labels } = job.data;
  const files = { path: resolve(fixture(""), path), labels: labels ?? undefined };
  const { batch, close } = openCorpus(files, readingOf(job));
  const checkpoint = { read: (name: string) => weights!.get(name)!.data };
  const run = runOn(plan, { localRanks: openCpu(plan), batch, watch, ...(weights && { checkpoint }) });
  const before = await run.parameters();
  const metrics = await run.step();
  const watched = new Map(await Promise.all(watch.map(async (id) => [id, await run.watched(id)] as const)));
  const gradients = await run.gradients();
  await run.close();
  const given = batch(0, job.train.global_batch);
  close();
  return { metrics, gradients, watched, weights: before, given };
}

/** The metrics with the losses that gradients are of: means over all microbatches, where the printed ones are over those with labels. */
function minimised(job: Job, { metrics, given }: Awaited<ReturnType<typeof firstStep>>): StepResult {
  const printed = learntOf(job, given);
  const { loss, mtp_loss } = metrics;
  return { ...metrics, loss: loss / printed.loss, ...(mtp_loss !== undefined && { mtp_loss: mtp_loss / printed.mtp }) };
}

/**
 * Returns the relative error of each stated slope against the measured one; weights that have no gradient are left out, and those that cannot
 * be moved without a router choosing otherwise.
 */
export async function slopeErrors(job: Job, objective: (metrics: StepResult) => number): Promise<Map<string, number>> {
  const watch = routerChoices(planOf(job));
  const chosen = ({ watched }: Awaited<ReturnType<typeof firstStep>>) =>
    [...watched.values()]
      .flat()
      .map(({ data }) => `${data}`)
      .join();
  const here = await firstStep(job, undefined, watch);
  const errors = new Map<string, number>();
  for (const [name, { data: g }] of here.gradients) {
    const stated = Math.sqrt(g.reduce((sum, x) => sum + x * x, 0));
    if (stated === 0) continue;
    /** The objective so far along the gradient; no number where a router chooses otherwise. */
    const at = async (h: number): Promise<number> => {
      const { shape, data } = here.weights.get(name)!;
      const moved = new Map(here.weights).set(name, { shape, data: data.map((x, i) => x + (h * g[i]!) / stated) });
      const there = await firstStep(job, moved, watch);
      return chosen(there) === chosen(here) ? objective(minimised(job, there)) : Number.NaN;
    };
    const central = async (h: number): Promise<number> => ((await at(h)) - (await at(-h))) / (2 * h);
    for (const h of [0.03, 0.01, 0.004]) {
      // (4·D(h/2) − D(h))/3 leaves h⁴; the loss is kept in f32, whose steps of 5e-7 are divided by h
      const measured = (4 * (await central(h / 2)) - (await central(h))) / 3;
      if (Number.isNaN(measured)) continue;
      errors.set(name, Math.abs(measured - stated) / (stated + 0.1));
      break;
    }
  }
  return errors;
}
