/** A whole run's gradients against the slope of what it is said to make smaller: one parameter after the other is moved along its own gradient. */
import { resolve } from "node:path";
import { readingOf } from "../runtime/batches.ts";
import { openCpu } from "../runtime/cpu.ts";
import { openCorpus } from "../runtime/data.ts";
import { runOn, type StepResult, type Tensor } from "../runtime/execute.ts";
import type { Job } from "../schemas/job.ts";
import { compile } from "../src/compile.ts";
import { fixture } from "./support.ts";

export type Weights = ReadonlyMap<string, Tensor>;

/** The first step from these weights, or from those of the job's seed; `weights` are as they were before it. */
export async function firstStep(job: Job, weights?: Weights, watch: readonly string[] = []) {
  const { plan } = compile(job);
  const { path, labels } = job.data;
  const files = { path: resolve(fixture(""), path), labels: labels ?? undefined };
  const { batch, close } = openCorpus(files, readingOf(job));
  const checkpoint = { read: (name: string) => weights!.get(name)!.data };
  const run = runOn(plan, { fleet: openCpu(plan), batch, watch, ...(weights && { checkpoint }) });
  const before = await run.parameters();
  const metrics = await run.step();
  const watched = new Map(await Promise.all(watch.map(async (id) => [id, await run.watched(id)] as const)));
  const gradients = await run.gradients();
  await run.close();
  const given = batch(0);
  close();
  return { metrics, gradients, watched, weights: before, given };
}

/** How far each told slope is from the measured one, relative to it; weights that have no gradient are left out. */
export async function slopeErrors(job: Job, objective: (metrics: StepResult) => number): Promise<Map<string, number>> {
  const { gradients, weights } = await firstStep(job);
  const errors = new Map<string, number>();
  for (const [name, { data: g }] of gradients) {
    const told = Math.sqrt(g.reduce((sum, x) => sum + x * x, 0));
    if (told === 0) continue;
    const at = async (h: number): Promise<number> => {
      const { shape, data } = weights.get(name)!;
      const moved = new Map(weights).set(name, { shape, data: data.map((x, i) => x + (h * g[i]!) / told) });
      return objective((await firstStep(job, moved)).metrics);
    };
    const central = async (h: number): Promise<number> => ((await at(h)) - (await at(-h))) / (2 * h);
    // (4·D(h/2) − D(h))/3 leaves h⁴; the loss is kept in f32, whose steps of 5e-7 are divided by h; and so near no router chooses otherwise
    const h = 0.006;
    errors.set(name, Math.abs((4 * (await central(h / 2)) - (await central(h))) / 3 - told) / (told + 0.01));
  }
  return errors;
}
