import { join } from "node:path";
import { type Command, Option } from "commander";
import { entryOf, sourceOf } from "../../schemas/lookup.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { cudaArchOf } from "../codegen/targetNames.ts";
import { type Stage, stages, stageTexts } from "../passes/passNames.ts";
import { compileAt, dataDirEntry, jobTextAt, loadPlan, planFile, readJobAt } from "./loadPlan.ts";
import { asWritten, type JobOptions, type ProcessExit, withExamples, withFormat, withSet, withTarget } from "./options.ts";
import { endProgress, occasionalProgress, printJson, printProgress, printReport, printStderr, printStdout } from "./output.ts";
import { expectWritableFolder, writeFolder } from "./outputFiles.ts";
import { type FindingFormat, findingFormats, printFindingsAs, shownFindings } from "./printFindings.ts";

interface CompileOptions extends JobOptions {
  readonly format: FindingFormat;
  readonly out?: string;
  readonly emit?: Stage;
  readonly target?: string;
  readonly cubins: boolean;
  readonly check?: true;
}

/** Registers `compile`: writes plan.json, plan.txt and the kernels of a job, or prints the text of one pass. */
export function registerCompile(program: Command, exit: ProcessExit): void {
  const command = program.command("compile").description("compile a job into a plan for all ranks");
  withExamples(
    withTarget(withSet(withFormat(command, findingFormats)))
      .argument("<job>", "the job's YAML file")
      .option("-o, --out <dir>", "the directory to write plan.json and plan.txt to")
      .option("--check", "write nothing: exit 1, with the differences, if the plan in --out is not that of the job")
      .option("--no-cubins", "CUDA: write kernel sources only; the host compiles them with NVRTC")
      .addOption(
        new Option("--emit <pass>", `print the text form of a pass: ${stages.map((s) => `${s} (${stageTexts[s]})`).join(", ")}`).choices(
          stages,
        ),
      ),
    "compile job.yaml -o plan/",
    "compile job.yaml -o plan/ --target cuda:sm_90a",
    "compile job.yaml --emit sharded",
    "compile job.yaml -f h200.yaml -o plan/",
    "compile job.yaml -o plan/ --check",
  ).action((path: string, options: CompileOptions) => runCompile(path, options, exit));
}

async function runCompile(path: string, options: CompileOptions, exit: ProcessExit): Promise<void> {
  const { out, emit } = options;
  if (options.check) return checkCompiled(path, options, exit);
  if (options.format === "sarif" || options.format === "github")
    throw new Trouble(`--format ${options.format} is a format of findings`, "add --check, or use rankc check");
  if (!out && !emit && !planFile(path)) throw new Trouble("compile needs -o DIR or --emit PASS", "name the output directory: -o plan/");
  if (out) expectWritableFolder(out);
  const compiled = await compileAt(path, options, options.target, emit !== undefined);
  const { sources } = compiled;
  const [plan, cubins] = out && options.cubins ? await withCubins(compiled.plan, sources, out) : [compiled.plan, new Map()];
  if (out) {
    const [{ printPlan }, { printPlanText }, { knownPlans }] = await Promise.all([
      import("../plan/seal.ts"),
      import("../report/planText.ts"),
      import("./cache.ts"),
    ]);
    const text = printPlan(plan);
    const kernels = [...sources, ...cubins].map(([file, content]) => [join("kernels", file), content] as const);
    writeFolder(out, { "plan.json": text, "plan.txt": printPlanText(plan), ...dataDirEntry(path, out), ...Object.fromEntries(kernels) });
    knownPlans.add(text);
  }
  if (emit) return printStdout(compiled.emit?.(emit) ?? "");
  const [{ summarize, printSummary }, { knownEstimate }, { profileFor }] = await Promise.all([
    import("../report/summary.ts"),
    import("./knownEstimate.ts"),
    import("./deviceProfile.ts"),
  ]);
  const estimate = knownEstimate(plan, await profileFor(plan.job.cluster.device));
  const summary = summarize(plan, estimate);
  if (options.format === "json")
    printJson({
      ...summary,
      out,
      ...(compiled.auto && { auto: compiled.auto }),
      ...(await shownFindings(compiled.findings, await textsOf(path))),
    });
  else printReport(`${printSummary(summary, estimate)}written to ${join(out ?? "", "plan.json")} and plan.txt`);
}

/** Returns the text of a job, by which findings become edits. */
const textsOf = async (path: string) => new Map([[path, await jobTextAt(path)]]);

/** Compiles without writing, and compares with the plan in the directory. */
async function checkCompiled(path: string, options: CompileOptions, exit: ProcessExit): Promise<void> {
  const { out, target, format } = options;
  if (!out) throw new Trouble("--check needs -o DIR", "name the directory of the plan: -o plan/");
  const { job, findings } = await readJobAt(path, options, target);
  const { comparePlan, printComparison, staleFinding } = await import("./checkPlan.ts");
  const compared = job && (await comparePlan(out, job, target));
  const stale = compared && staleFinding(compared, path);
  const all = stale && format !== "text" ? [...findings, stale] : findings;
  await printFindingsAs(format, all, await textsOf(path), { valid: job !== undefined, changes: stale !== undefined });
  if (compared && format === "text") printComparison(compared);
  if (!job || stale) exit.setCode(1);
}

/** Compiles the kernels of a CUDA plan with nvcc. Returns the plan unchanged if it is for another backend, or if nvcc is missing. */
async function withCubins(plan: Plan, sources: ReadonlyMap<string, string>, out: string): Promise<[Plan, Map<string, Uint8Array>]> {
  const arch = cudaArchOf(plan.toolchain.target);
  if (arch === undefined) return [plan, new Map()];
  const [{ makeCubins, nvccVersion }, { compileOptions, cubinFile }, { sealCubins }] = await Promise.all([
    import("../codegen/cubins.ts"),
    import("../../runtime/cuda/kernels.ts"),
    import("../plan/seal.ts"),
  ]);
  if (!nvccVersion()) {
    printStderr("nvcc is not installed: the host that runs the plan compiles its kernels with NVRTC");
    return [plan, new Map()];
  }
  const units = plan.kernels.map((k) => ({ kernel: k.id, text: entryOf(sources, sourceOf(k).file, "source"), cubin: cubinFile(k, arch) }));
  const print = occasionalProgress();
  const onProgress = (done: number, of: number): void => (done === of ? printProgress : print)(`nvcc: ${done} of ${of} kernels`);
  const cubins = await makeCubins(units, { arch, options: compileOptions, onProgress, known: await cubinsAt(out) });
  endProgress();
  return [
    sealCubins(plan, new Map(units.map(({ kernel, cubin }) => [kernel, { file: cubin, bytes: entryOf(cubins, cubin, "cubin") }]))),
    cubins,
  ];
}

/** Returns the intact cubins of the plan that a directory already holds, so that nvcc compiles only changed kernels. */
async function cubinsAt(out: string): Promise<(file: string) => Uint8Array | undefined> {
  try {
    const earlier = planFile(out) ? await loadPlan(out, asWritten) : undefined;
    const found = (earlier?.plan.kernels ?? []).flatMap((k) => k.cubin?.file ?? []).map((file) => [file, earlier?.cubin?.(file)] as const);
    const cubins = new Map(found);
    return (file) => cubins.get(file);
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    // the command overwrites a damaged plan
    return () => undefined;
  }
}
