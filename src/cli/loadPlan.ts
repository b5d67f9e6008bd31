/** Loads jobs and plans for the commands. Compiler modules are imported on use, so that `check` and `explain` start fast. */

import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { basename, dirname, join, relative, resolve } from "node:path";
import type { Job } from "../../schemas/job.ts";
import { entryOf } from "../../schemas/lookup.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { targetNames } from "../codegen/targetNames.ts";
import type { Compiled } from "../compile.ts";
import type { AutoChoice, ChooseAuto } from "../frontend/auto.ts";
import type { Finding } from "../frontend/diagnostic.ts";
import type { JobOptions } from "./options.ts";
import { debugLevel, hasColor, narrowTerminal, printStderr, printStyled } from "./output.ts";

/** A plan with access to the kernel files that belong to it. */
export interface LoadedPlan {
  readonly plan: Plan;
  /** Returns the source text of a kernel file. */
  source(file: string): string;
  /** Returns the bytes of a cubin; undefined if the plan has none of this name. */
  cubin?(file: string): Uint8Array | undefined;
}

/** The job is invalid and its findings are printed: the command exits with code 1. */
export class InvalidJob extends Error {}

/** Reads a job file, or a job of a revision (`git:REV:PATH`), and checks it for `target`, or for all device targets. Throws a Trouble if it cannot be read. */
export async function readJobAt(path: string, options: JobOptions, target?: string) {
  return readJobText(await jobTextAt(path), path, options, target);
}

/** Returns the text of a job file, or of a job of a revision. Throws a Trouble if it cannot be read. */
export const jobTextAt = async (path: string): Promise<string> => (await import("./jobFiles.ts")).jobFiles([]).read(path);

/** Checks the text of a job for `target`, or for all device targets. */
export async function readJobText(text: string, path: string, { set, overlay }: JobOptions, target?: string) {
  const { interpretSchemas } = await import("./zodSettings.ts");
  interpretSchemas();
  const [{ jobFiles }, { readJobWith }, { knownPeaks }] = await Promise.all([
    import("./jobFiles.ts"),
    import("../frontend/readJob.ts"),
    import("./cache.ts"),
  ]);
  const named = target !== undefined && targetNames.includes(target) ? target : undefined;
  const load = async () => {
    const { loadDeviceTargets, loadTarget } = await import("../codegen/targets.ts");
    if (named === undefined) return loadDeviceTargets();
    const loaded = await loadTarget(named);
    return () => loaded;
  };
  const chooseAuto: ChooseAuto = async (request) => (await import("./resolveAuto.ts")).resolveAuto(request);
  return readJobWith({ load, target: named, known: knownPeaks(target), chooseAuto }, text, path, set, jobFiles(overlay));
}

/** What is done with the findings of a job; default: they are printed. */
type Report = (findings: readonly Finding[]) => Promise<void>;

/** Compiles a job for a target (default: cpu), or takes the plan that the cache has, and reports its findings. `needsPasses`: compile in any case, for `emit`. Throws InvalidJob, or a Trouble if the file cannot be read. */
export async function compileAt(
  path: string,
  options: JobOptions,
  named?: string,
  needsPasses = false,
  report: Report = printFindings,
): Promise<Pick<Compiled, "plan" | "sources"> & Partial<Pick<Compiled, "emit">> & { findings: readonly Finding[]; auto?: AutoChoice }> {
  const { job, findings, auto } = await readJobAt(path, options, named === forDevice ? undefined : named);
  await report(findings);
  if (!job) throw new InvalidJob();
  if (auto) printStderr(await autoLine(auto));
  return { ...(await compileJob(job, named ?? "cpu", needsPasses)), findings, ...(auto && { auto }) };
}

/** Returns the line about the values of `auto` keys. */
export async function autoLine(auto: AutoChoice): Promise<string> {
  const [{ chosenText }, { countText, plural, secondsText }] = await Promise.all([import("../frontend/auto.ts"), import("../units.ts")]);
  const from = `the fastest of ${plural(auto.plans, "plan")} from ${countText(auto.choices)} choices`;
  return `auto: ${chosenText(auto)} (${secondsText(auto.seconds)} a step by the profile ${auto.profile}, ${from})`;
}

/** Compiles a valid job for a target, or takes the plan that the cache has. `needsPasses`: compile in any case. */
export async function compileJob(
  job: Job,
  target: string,
  needsPasses = false,
): Promise<Pick<Compiled, "plan" | "sources"> & Partial<Pick<Compiled, "emit">>> {
  const [{ targetFor }, { recallCompiled, rememberCompiled }, { printPlan, readSealed }] = await Promise.all([
    import("../codegen/targetNames.ts"),
    import("./cache.ts"),
    import("../plan/seal.ts"),
  ]);
  const level = debugLevel();
  const name = target === forDevice ? `${forDevice} ${job.cluster.device}` : targetFor(target, job);
  const kept = level === 0 && !needsPasses ? recallCompiled(job, name) : undefined;
  if (kept) return { plan: readSealed(kept.plan), sources: new Map(kept.sources) };
  const [{ compile }, { loadDeviceTargets, loadTarget }] = await Promise.all([import("../compile.ts"), import("../codegen/targets.ts")]);
  const trace = level === 0 ? {} : { trace: (await import("../passes/passNames.ts")).tracePasses(printStderr, { changes: level > 1 }) };
  const loaded = target === forDevice ? (await loadDeviceTargets())(job.cluster.device) : await loadTarget(name);
  const compiled = compile(job, { target: loaded, ...trace });
  rememberCompiled(job, name, { plan: printPlan(compiled.plan), sources: [...compiled.sources] });
  return compiled;
}

/** In place of a target: the kernels of cluster.device, without their texts. Such a plan is for reports, and not to be written. */
export const forDevice = "device";

/** Reads a plan, or compiles a job for its device: kernels as they would run there, for reports of time and memory. Throws what `loadPlan` throws. */
export const loadPlanForDevice = (path: string, options: JobOptions): Promise<LoadedPlan> =>
  isPlanPath(path) ? loadPlan(path, options) : loadPlan(path, options, forDevice);

/** Reads a plan, or compiles a job. Throws a Trouble if `--target`, `--set` or `-f` is given for a plan, and whatever `compileAt` throws. */
export async function loadPlan(path: string, options: JobOptions, target?: string, report?: Report): Promise<LoadedPlan> {
  if (basename(path) === "plan.txt" && existsSync(join(dirname(path), "plan.json")))
    throw new Trouble(`${path} is the text of a plan for people`, `name the folder: ${dirname(path)}`);
  const inGit = await resolvedGitFile(path);
  const file = inGit ? undefined : planFile(path);
  if (!file && !inGit?.isPlan) {
    const { plan, sources } = await compileAt(path, options, target, false, report);
    return { plan, source: (name) => entryOf(sources, name, "source") };
  }
  if (target !== undefined) throw new Trouble(`--target needs a job; ${path} is a compiled plan`, "name the job, or omit --target");
  for (const [option, given] of [
    ["--set", options.set],
    ["-f", options.overlay],
  ] as const)
    if (given.length > 0) throw new Trouble(`${option} needs a job; ${path} is a compiled plan`, `name the job, or omit ${option}`);
  const { readCubin, readKernel, readPlanFile } = await import("./inputFiles.ts");
  if (!file) {
    const source = (): string => {
      throw new Trouble(`${path} is a plan of a revision: its kernels are not read`, "check the revision out to use its kernels");
    };
    return { plan: await parsePlanText(inGit?.read() ?? "", path), source };
  }
  const plan = await parsePlanText(readPlanFile(file), file);
  return {
    plan,
    source: (name) => readKernel(plan, dirname(file), name),
    cubin: (name) => readCubin(plan, dirname(file), name),
  };
}

/** Parses the text of a plan file. A text in which an earlier command found no fault is only parsed. Throws what `parsePlan` throws. */
export async function parsePlanText(text: string, file: string): Promise<Plan> {
  const { knownPlans } = await import("./cache.ts");
  if (knownPlans.has(text)) return (await import("../plan/seal.ts")).readSealed(text);
  // what checks a plan takes longer to load than the digest of a known one
  const plan = (await import("../plan/read.ts")).parsePlan(text, file);
  knownPlans.add(text);
  return plan;
}

/** Returns the file that `git:REV:PATH` means, and its reader; undefined for other paths. Throws a Trouble if git has no such file. */
async function resolvedGitFile(path: string) {
  if (!path.startsWith("git:")) return undefined;
  const { gitFile, readGitFile, resolveGitFile } = await import("./gitFiles.ts");
  const named = gitFile(path);
  if (!named) return undefined;
  const file = resolveGitFile(named);
  return { isPlan: file.isPlan, read: () => readGitFile(file) };
}

/** Returns whether a path names a plan: its directory, its plan.json, or `git:REV:PATH` of either by its name. */
export const isPlanPath = (path: string): boolean => (path.startsWith("git:") ? !/\.ya?ml$/.test(path) : planFile(path) !== undefined);

/** Returns the plan.json that a path names, by itself or by its directory; undefined if the path names a job. */
export function planFile(path: string): string | undefined {
  if (basename(path) === "plan.json") return existsSync(path) && !isDirectory(path) ? path : undefined;
  const inside = join(path, "plan.json");
  return isDirectory(path) && existsSync(inside) ? inside : undefined;
}

/** The file beside plan.json with the directory of the job, relative to it. It is not a part of the plan: equal jobs have equal plans anywhere. */
const dataDirFile = "data_dir.txt";

/** Returns the content of `dataDirFile` for a plan in `out`, as a file of the folder; nothing if the job is there. */
export function dataDirEntry(job: string, out: string): Readonly<Record<string, string>> {
  const path = relative(resolve(out), resolve(dirname(job)));
  return path === "" ? {} : { [dataDirFile]: `${path}\n` };
}

/**
 * Returns the default base directory of data.path: that of the job, or the one that a plan remembers. If the plan was moved, so that this one does
 * not exist, the directory of the plan.
 */
export function dataDirOf(path: string): string {
  const plan = planFile(path);
  if (!plan) return isDirectory(path) ? path : dirname(path);
  const folder = dirname(plan);
  const file = join(folder, dataDirFile);
  if (!existsSync(file)) return folder;
  const remembered = join(folder, readFileSync(file, "utf8").trim());
  return isDirectory(remembered) ? remembered : folder;
}

/** The most files in which the job of a plan is looked for. */
const MOST_JOBS = 20;

/** Returns the files that may hold the job of a plan: job.yaml beside it or in the folder above, then the YAML files of the folder that it remembers. */
export function jobCandidates(plan: string): string[] {
  const remembered = dataDirOf(plan);
  const inOrder = yamlNames(remembered)
    .sort((a, b) => Number(b === "job.yaml") - Number(a === "job.yaml") || (a < b ? -1 : 1))
    .slice(0, MOST_JOBS);
  const folder = dirname(plan);
  const all = [join(folder, "job.yaml"), join(folder, "..", "job.yaml"), ...inOrder.map((name) => join(remembered, name))];
  return [...new Set(all)];
}

function yamlNames(folder: string): string[] {
  try {
    return readdirSync(folder).filter((name) => /\.ya?ml$/.test(name));
  } catch {
    // a folder that may not be read has no candidates
    return [];
  }
}

const isDirectory = (path: string): boolean => existsSync(path) && statSync(path).isDirectory();

/** Prints findings to stderr, in color on a terminal. */
export async function printFindings(findings: readonly Finding[]): Promise<void> {
  if (findings.length === 0) return;
  const { renderFindings } = await import("../frontend/diagnostic.ts");
  printStyled(renderFindings(findings, { color: hasColor(), width: narrowTerminal() }));
}
