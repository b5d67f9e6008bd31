/** Makes the data of the page from plans: the reports of `inspect`, `why` and `diff`, and the programs with equal parts once. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import type { Plan } from "../../../schemas/plan.ts";
import { blocksOf } from "../../../schemas/program.ts";
import { diffPlans } from "../diff.ts";
import { inspectPlan } from "../inspect.ts";
import { trafficOf, type Warning } from "../overview.ts";
import { kernelWork } from "../sections.ts";
import { keyOfBuffer, keyOfCompute } from "../whyKeys.ts";
import { blockTimes } from "./blockTimes.ts";
import { flowsOf } from "./flows.ts";
import { type JobView, type KernelView, type PlanView, VIEW_VERSION, type ViewData } from "./planView.ts";
import { programsView } from "./programView.ts";

/** A plan, with what a page shows beside it. */
export interface PlanToView {
  readonly plan: Plan;
  readonly job: JobView;
  readonly warnings: readonly Warning[];
  /** The profile by which a step is estimated; without it times are units of the schedule. */
  readonly profile?: DeviceProfile | undefined;
}

/** Returns the data of a page about one plan, or about two and their differences. */
export function viewData(shown: readonly PlanToView[]): ViewData {
  const [first, second] = shown;
  const diff = first && second ? { diff: diffPlans(first.plan, second.plan) } : {};
  // two plans have one unit of time
  const isTimed = shown.every(({ profile }) => profile !== undefined);
  return { version: VIEW_VERSION, plans: shown.map((one) => planView(isTimed ? one : { ...one, profile: undefined })), ...diff };
}

function planView({ plan, job, warnings, profile }: PlanToView): PlanView {
  const inspection = inspectPlan(plan, { profile });
  return {
    inspection,
    mesh: plan.mesh,
    job,
    warnings,
    timeline: blockTimes(plan, profile),
    ...programsView(plan),
    kernels: kernelsView(plan),
    flows: flowsOf(plan),
    traffic: inspection.roles.map(trafficOf),
  };
}

function kernelsView(plan: Plan): KernelView[] {
  const byId = new Map(plan.kernels.map((kernel) => [kernel.id, kernel]));
  return kernelWork(plan).map((work) => {
    const kernel = byId.get(work.id);
    const file = kernel?.source?.file;
    return {
      ...work,
      attrs: kernel?.attrs ?? {},
      threads: kernel?.launches.map(({ threads }) => threads) ?? [],
      ...(file === undefined ? {} : { file }),
    };
  });
}

/** Returns the keys of the job that decide about instructions and buffers. */
export function decidingKeys({ programs, job }: Plan): string[] {
  const keys = new Set<string>();
  for (const { chunks, buffers, ...rest } of programs) {
    for (const block of blocksOf({ chunks, ...rest }))
      for (const i of block.instructions) keys.add(i.kind === "compute" ? keyOfCompute(i, block.kind).path : i.why.path);
    for (const b of buffers) keys.add(keyOfBuffer(job, b, chunks[b.chunk ?? 0]?.copies ?? 1).path);
  }
  return [...keys];
}
