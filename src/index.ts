/**
 * The library: everything that the command line does, as functions. docs/library.md shows a job read, compiled, inspected, compared
 * and trained. Functions throw a `Trouble` for what a caller can correct, and any other error for a bug of rankc.
 */

export type { Run, StepResult, Tensor } from "../runtime/train/loop.ts";
export { type OpenRun, openRun, type RunSettings } from "../runtime/train/openRun.ts";
export type { DeviceProfile } from "../schemas/deviceProfile.ts";
export type { Job } from "../schemas/job.ts";
export type { Instruction, Kernel, Memory, Plan, Program } from "../schemas/plan.ts";
export { Trouble } from "../schemas/trouble.ts";
export { type Estimate, type EstimateOptions, estimate } from "./analysis/estimate/estimate.ts";
export { parseProfile } from "./analysis/estimate/profileFile.ts";
export { packageProfile } from "./analysis/estimate/profiles.ts";
export { timingsOf } from "./analysis/estimate/timings.ts";
export { loadTarget, type Target } from "./codegen/targets.ts";
export { type Compiled, compile, type Settings } from "./compile.ts";
export { importHf, importHfText } from "./convert/hf/importHf.ts";
export { type Finding, renderFindings } from "./frontend/diagnostic.ts";
export { explained as explainCode } from "./frontend/explainText.ts";
export type { JobFiles } from "./frontend/jobFiles.ts";
export type { JobRead } from "./frontend/readJob.ts";
export { readJob } from "./frontend/readJobNow.ts";
export { parsePlan as readPlan } from "./plan/read.ts";
export { printPlan } from "./plan/seal.ts";
export { diffPlans, type PlanDiff } from "./report/diff.ts";
export { printDiff } from "./report/diffText.ts";
export { inspectPlan } from "./report/inspect.ts";
export { inspectRank } from "./report/inspectRank.ts";
export { printInspect } from "./report/inspectText.ts";
export { printPlanText } from "./report/planText.ts";
export { settingsOf as searchSettings } from "./search/choice.ts";
export { type AutoOptions, readJobAuto } from "./search/readJobAuto.ts";
export { type SearchOptions, type SearchResult, search } from "./search/search.ts";
export { version } from "./version.ts";
