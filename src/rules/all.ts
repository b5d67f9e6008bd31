/** All rules, with the one that compiles a job to judge its memory. `index.ts` has the others, which load no compiler. */
import { type Device, devices } from "../../schemas/devices.ts";
import type { Job } from "../../schemas/job.ts";
import { cpu, type Target } from "../codegen/targets.ts";
import type { Finding } from "../frontend/diagnostic.ts";
import type { Source } from "../frontend/source.ts";
import { memoryBoundOfStages, memoryOfStages } from "../peakMemory.ts";
import { findingsOfMemory } from "./index.ts";
import { jobRules } from "./jobRules.ts";
import { highestPeak, memoryRule, type Peak } from "./memory.ts";
import type { Rule } from "./rule.ts";

/** Returns the highest peak of a job's ranks, with the kernels of a target, whose scratch is part of it. */
export const peakOf = (job: Job, target: Target = cpu): Peak => highestPeak(job, memoryOfStages(job, target));

/** Returns an upper bound of the highest peak of a job's ranks, without the kernels of the target; default: that of the job's device. */
export const peakBound = (job: Job, target: string = devices[job.cluster.device].target): Peak => ({
  ...highestPeak(job, memoryBoundOfStages(job, target)),
  isBound: true,
});

/** All rules; that about memory for the target `cpu`, which has no kernels. */
export const rules: readonly Rule[] = [...jobRules, memoryRule((job) => peakOf(job))];

/** Returns the findings of the memory rule, which compiles a job without errors. `targetOf` returns the kernel target of a device. */
export const memoryFindings = (job: Job, source: Source, targetOf: (device: Device) => Target): Finding[] =>
  findingsOfMemory(job, source, (of) => peakOf(of, targetOf(of.cluster.device)));
