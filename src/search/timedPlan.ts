/** The time and the memory of a choice, and whether rules allow it. */
import type { Job } from "../../schemas/job.ts";
import type { Estimate } from "../analysis/estimate/estimate.ts";
import type { TimeParts } from "../analysis/estimate/timeParts.ts";
import { jobRules } from "../rules/jobRules.ts";

/** The time and the memory of a plan. */
export interface TimedPlan {
  readonly seconds: number;
  readonly tokens_per_second: number;
  readonly model_flops_per_second: number;
  /** Bytes of the rank with the most memory. */
  readonly peak: number;
  /** The seconds of the busiest stage by part; they add up to the step. */
  readonly parts: Readonly<Record<string, number>>;
}

/** Returns what a search keeps of an estimate. `peak`: bytes of the rank with the most memory. */
export function timedPlan(result: Estimate, peak: number): TimedPlan {
  const busiest = result.stages.find(({ stage }) => stage === result.busiest) ?? result.stages[0];
  return {
    ...{ seconds: result.seconds, tokens_per_second: result.tokens_per_second, model_flops_per_second: result.model_flops_per_second },
    ...{ peak, parts: busiest ? partsOf(busiest.parts) : {} },
  };
}

/** Returns the parts of a step: products and other kernels, waiting for communication by axes, launches, waiting for other stages. */
function partsOf({ kernels, exposed, launches, bubble }: TimeParts): Readonly<Record<string, number>> {
  return { ...kernels, ...Object.fromEntries([...exposed].map(([axes, s]) => [`waits for ${axes}`, s])), launches, bubble };
}

/** Returns the first error of the rules, as code and title. */
export function firstError(job: Job): string | undefined {
  for (const rule of jobRules) if (rule.level === "error" && [...rule.check(job)].length > 0) return `${rule.code} ${rule.title}`;
  return undefined;
}
