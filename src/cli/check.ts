import { isAbsolute, normalize } from "node:path";
import type { Command } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import type { AppliedFix, FixedJob } from "../frontend/fixJob.ts";
import { type CheckedJob, checkedJob, isChanged, type JobQuestions, writeFixed } from "./checkedJob.ts";
import { autoLine } from "./loadPlan.ts";
import { type ProcessExit, withExamples, withFormat, withSet } from "./options.ts";
import { printStderr, printStdout } from "./output.ts";
import { type FindingFormat, findingFormats, printFindingsAs } from "./printFindings.ts";

interface CheckOptions extends JobQuestions {
  readonly format: FindingFormat;
  readonly dryRun?: true;
  readonly print?: true;
  readonly defaults?: true;
}

/** Registers `check`: prints all findings of jobs; exits with 1 if a job is invalid, a plan is stale, or with `--strict` if there are warnings. */
export function registerCheck(program: Command, exit: ProcessExit): void {
  withExamples(
    withSet(withFormat(program.command("check").description("check jobs and print all findings"), findingFormats))
      .option("--strict", "count warnings as errors")
      .option("--fix", "apply the fixes that are safe: they change no number of the run, and no comment or layout of the file")
      .option("--dry-run", "with --fix: write no file, print the changes as a unified diff; exit 1 if there are any")
      .option("--plans", "also compare committed plans: beside job.yaml, in plan/ beside it, or for NAME.yaml in NAME/")
      .option("--print", "print the job with the files that it extends, -f and --set, and where each value comes from")
      .option("--defaults", "with --print: also keys that have their defaults")
      .argument("<job...>", "YAML files of jobs"),
    "check job.yaml",
    "check job.yaml --set parallel.tensor=4 --set parallel.sequence=true",
    "check job.yaml --strict",
    "check job.yaml -f h200.yaml --print",
    "check job.yaml --fix --dry-run",
    "check jobs/*.yaml --plans --format sarif > rankc.sarif",
  ).action(async (paths: readonly string[], options: CheckOptions) => {
    if (options.dryRun && !options.fix) throw new Trouble("--dry-run is given without --fix", "write check --fix --dry-run");
    if (options.defaults && !options.print) throw new Trouble("--defaults needs --print", "add --print");
    if (options.print && paths.length > 1) throw new Trouble("--print takes one job", "name one job");
    const jobs: CheckedJob[] = [];
    for (const path of paths) jobs.push(await checkedJob(path, options));
    if (options.fix && !options.dryRun) await writeFixed(jobs);
    await print(jobs, options);
    const isStale = jobs.some(({ compared }) => (compared?.stale.length ?? 0) > 0);
    if (isStale || jobs.some((job) => !job.isValid || (options.dryRun && isChanged(job)))) exit.setCode(1);
  });
}

async function print(jobs: readonly CheckedJob[], options: CheckOptions): Promise<void> {
  const diff = options.dryRun ? await diffOf(jobs) : undefined;
  const resolved = options.print ? await resolvedOf(jobs[0], options) : undefined;
  if (options.format !== "text")
    return printData(jobs, options, {
      ...(diff !== undefined && { diff }),
      ...(resolved && { resolved: { job: resolved.value, origins: resolved.origins } }),
    });
  const findings = jobs.flatMap((job) => job.findings);
  await printFindingsAs("text", findings, new Map());
  // the diff alone is on stdout
  const say = options.dryRun ? printStderr : printStdout;
  for (const job of jobs) {
    for (const line of linesOf(job, options, resolved !== undefined)) say(line);
    if (job.read.auto) printStderr(await autoLine(job.read.auto));
    if (job.compared) (await import("./checkPlan.ts")).printComparison(job.compared);
  }
  if (resolved) printStdout(resolved.text());
  if (diff) printStdout(diff);
}

/** Prints findings for programs; a stale plan is one of them. */
async function printData(jobs: readonly CheckedJob[], { format, fix, dryRun }: CheckOptions, more: object): Promise<void> {
  const { staleFinding } = await import("./checkPlan.ts");
  const findings = jobs.flatMap(({ path, findings: own, compared }) => [own, (compared && staleFinding(compared, path)) ?? []].flat());
  const texts = new Map(jobs.map(({ path, text, fixed }) => [path, dryRun ? text : (fixed?.text ?? text)]));
  return printFindingsAs(format, findings, texts, {
    valid: jobs.every(({ isValid }) => isValid),
    jobs: jobs.map(({ path, isValid, compared, read }) => ({
      ...{ file: path, valid: isValid },
      ...(read.auto && { auto: read.auto }),
      ...(compared && { plan: compared.folder, stale: compared.stale }),
    })),
    ...(fix && { fixes: jobs.flatMap(({ path, fixed }) => (fixed ? fixesJson(path, fixed) : [])) }),
    ...more,
  });
}

/** Returns the job with the files that it builds on; undefined if it is no YAML. */
async function resolvedOf(checked: CheckedJob | undefined, { defaults }: CheckOptions) {
  if (checked?.read.source.value === undefined) return undefined;
  const { source, job } = checked.read;
  return (await import("../frontend/resolvedJob.ts")).resolvedJob(source, defaults ? job : undefined);
}

function linesOf({ path, fixed, isValid, read, findings }: CheckedJob, { dryRun }: CheckOptions, isPrinted: boolean): string[] {
  const warnings = findings.filter(({ level }) => level === "warning").length;
  const isTooStrict = !isValid && read.job !== undefined;
  return [
    ...(fixed?.applied ?? []).map(({ finding, change }) => `${path}: ${dryRun ? "would fix" : "fixed"} ${finding.code}: ${change}`),
    ...(fixed?.left ?? []).map(({ finding, change, why }) => `${path}: not fixed ${finding.code}: ${change}; ${why}`),
    ...(isValid && !isPrinted ? [`${path}: valid`] : []),
    ...(isTooStrict
      ? [`${path}: ${warnings} warning${warnings > 1 ? "s" : ""}, which --strict counts as errors; allow accepts one with a reason`]
      : []),
  ];
}

function fixesJson(file: string, { applied, left }: FixedJob) {
  const fix = ({ finding: { code, path }, change }: AppliedFix) => ({ code, path, change });
  return { file, applied: applied.map(fix), not_applied: left.map((one) => ({ ...fix(one), why: one.why })) };
}

/** Returns the unified diff of the fixes, which `git apply` and `patch -p1` read. */
async function diffOf(jobs: readonly CheckedJob[]): Promise<string> {
  const { createTwoFilesPatch, FILE_HEADERS_ONLY } = await import("diff");
  return jobs
    .filter(isChanged)
    .map(({ path, text, fixed }) => {
      const names = isAbsolute(path) ? ([path, path] as const) : ([`a/${normalize(path)}`, `b/${normalize(path)}`] as const);
      return createTwoFilesPatch(...names, text, fixed?.text ?? "", undefined, undefined, { headerOptions: FILE_HEADERS_ONLY });
    })
    .join("");
}
