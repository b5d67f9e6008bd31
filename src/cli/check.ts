import { isAbsolute, normalize } from "node:path";
import type { Command } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import type { AppliedFix, FixedJob } from "../frontend/fixJob.ts";
import type { JobRead } from "../frontend/readJob.ts";
import { jobTextAt, readJobText } from "./loadPlan.ts";
import { asWritten, type JobOptions, type ProcessExit, withExamples, withFormat, withSet } from "./options.ts";
import { printStderr, printStdout } from "./output.ts";
import { type FindingFormat, findingFormats, printFindingsAs } from "./printFindings.ts";

interface CheckOptions extends JobOptions {
  readonly format: FindingFormat;
  readonly strict?: true;
  readonly fix?: true;
  readonly dryRun?: true;
  readonly print?: true;
  readonly defaults?: true;
}

/** A job that was checked. `fixed`: after its fixes. */
interface CheckedJob {
  readonly path: string;
  readonly text: string;
  readonly read: JobRead;
  readonly isValid: boolean;
  readonly warnings: number;
  readonly fixed?: FixedJob;
}

/** Registers `check`: prints all findings of jobs; exits with 1 if a job is invalid, or with `--strict` if one has warnings. */
export function registerCheck(program: Command, exit: ProcessExit): void {
  withExamples(
    withSet(withFormat(program.command("check").description("check jobs and print all findings"), findingFormats))
      .option("--strict", "count warnings as errors")
      .option("--fix", "apply the fixes that are safe: they change no number of the run, and no comment or layout of the file")
      .option("--dry-run", "with --fix: write no file, print the changes as a unified diff; exit 1 if there are any")
      .option("--print", "print the job with the files that it extends, -f and --set, and where each value comes from")
      .option("--defaults", "with --print: also keys that have their defaults")
      .argument("<job...>", "YAML files of jobs"),
    "check job.yaml",
    "check job.yaml --set parallel.tensor=4 --set parallel.sequence=true",
    "check job.yaml --strict",
    "check job.yaml -f h200.yaml --print",
    "check job.yaml --fix --dry-run",
    "check job.yaml --fix",
    "check jobs/*.yaml --format sarif > rankc.sarif",
  ).action(async (paths: readonly string[], options: CheckOptions) => {
    if (options.dryRun && !options.fix) throw new Trouble("--dry-run is given without --fix", "write check --fix --dry-run");
    if (options.defaults && !options.print) throw new Trouble("--defaults needs --print", "add --print");
    if (options.print && paths.length > 1) throw new Trouble("--print takes one job", "name one job");
    const jobs: CheckedJob[] = [];
    for (const path of paths) jobs.push(await checked(path, options));
    const changes = jobs.filter(({ text, fixed }) => fixed !== undefined && fixed.text !== text);
    if (options.fix && !options.dryRun) await writeFixed(changes);
    await print(jobs, options);
    if (jobs.some(({ isValid }) => !isValid) || (options.dryRun && changes.length > 0)) exit.setCode(1);
  });
}

async function checked(path: string, options: CheckOptions): Promise<CheckedJob> {
  if (options.fix && path.startsWith("git:"))
    throw new Trouble(`${path} is of a revision, which --fix cannot change`, "check the revision out, and name the file");
  const text = await jobTextAt(path);
  const fixed = options.fix && (await fixedJob(path, text, options));
  const read = fixed ? fixed.read : await readJobText(text, path, options);
  const warnings = read.findings.filter(({ level }) => level === "warning").length;
  const isValid = read.job !== undefined && !(options.strict && warnings > 0);
  return { path, text, read, isValid, warnings, ...(fixed && { fixed }) };
}

async function fixedJob(path: string, text: string, { set, overlay }: JobOptions): Promise<FixedJob> {
  if (path.startsWith("git:"))
    throw new Trouble(`${path} is of a revision, which --fix cannot change`, "check the revision out, and name the file");
  const { fixJob } = await import("../frontend/fixJob.ts");
  const job = (of: string) => readJobText(of, path, { set, overlay });
  const isChanged = set.length + overlay.length > 0;
  return fixJob(text, { job, file: isChanged ? (of) => readJobText(of, path, asWritten) : job });
}

/** Writes the fixed files, all or none. Throws a Trouble if one is read-only, or was changed meanwhile. */
async function writeFixed(changes: readonly CheckedJob[]): Promise<void> {
  if (changes.length === 0) return;
  const { expectWritable, writeFiles } = await import("./outputFiles.ts");
  for (const { path, text } of changes) {
    expectWritable(path);
    if ((await jobTextAt(path)) !== text)
      throw new Trouble(`${path} was changed while it was checked; no file is written`, "run check --fix again");
  }
  writeFiles(changes.map(({ path, fixed }) => [path, fixed?.text ?? ""]));
}

async function print(jobs: readonly CheckedJob[], options: CheckOptions): Promise<void> {
  const findings = jobs.flatMap(({ read }) => read.findings);
  const texts = new Map(jobs.map(({ path, text, fixed }) => [path, options.dryRun ? text : (fixed?.text ?? text)]));
  const diff = options.dryRun ? await diffOf(jobs) : "";
  const resolved = options.print ? await resolvedOf(jobs, options) : undefined;
  if (options.format !== "text") {
    const fixes = jobs.flatMap(({ path, fixed }) => (fixed ? [fixesJson(path, fixed)] : []));
    const more = { valid: jobs.every(({ isValid }) => isValid), jobs: jobs.map(({ path, isValid }) => ({ file: path, valid: isValid })) };
    return printFindingsAs(options.format, findings, texts, {
      ...more,
      ...(options.fix && { fixes }),
      ...(options.dryRun && { diff }),
      ...(resolved && { resolved: { job: resolved.value, origins: resolved.origins } }),
    });
  }
  await printFindingsAs("text", findings, texts);
  const say = options.dryRun ? printStderr : printStdout;
  for (const job of jobs) for (const line of linesOf(job, options, resolved !== undefined)) say(line);
  if (resolved) printStdout(resolved.text());
  if (diff !== "") printStdout(diff);
}

/** Returns the job with the files that it builds on; undefined if it is no YAML. */
async function resolvedOf(jobs: readonly CheckedJob[], { defaults }: CheckOptions) {
  const [{ read: { source = undefined, job = undefined } = {} } = {}] = jobs;
  if (source?.value === undefined) return undefined;
  return (await import("../frontend/resolvedJob.ts")).resolvedJob(source, defaults ? job : undefined);
}

function linesOf({ path, fixed, isValid, read, warnings }: CheckedJob, { strict, dryRun }: CheckOptions, isPrinted: boolean): string[] {
  const isTooStrict = strict && warnings > 0 && read.job !== undefined;
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
    .filter(({ text, fixed }) => fixed !== undefined && fixed.text !== text)
    .map(({ path, text, fixed }) => {
      const names = isAbsolute(path) ? ([path, path] as const) : ([`a/${normalize(path)}`, `b/${normalize(path)}`] as const);
      return createTwoFilesPatch(...names, text, fixed?.text ?? "", undefined, undefined, { headerOptions: FILE_HEADERS_ONLY });
    })
    .join("");
}
