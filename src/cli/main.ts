#!/usr/bin/env node
/**
 * The command line: parses and exits; the work is done elsewhere. Data goes to stdout, all else to stderr (say.ts).
 * Exit 0: yes. 1: no (the job is invalid, the plans differ). 2: trouble. 3: the plan does not fit this machine.
 * What a command needs is loaded when it runs, so that `check` and `compile` start fast.
 */
import { existsSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { Command, CommanderError, InvalidArgumentError, Option } from "commander";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { unwritten } from "../../schemas/writing.ts";
import { targetNames } from "../codegen/targetNames.ts";
import type { Compiled } from "../compile.ts";
import type { Finding } from "../frontend/diagnostic.ts";
import { readPackageFile } from "../packageFile.ts";
import { type Stage, stages } from "../passes/passNames.ts";
import { endProgress, type Format, printError, printJson, printProgress, printStderr, printStdout, tellStyled } from "./output.ts";
import { expectWritable, expectWritableFolder, writeFile, writeFolder } from "./outputFiles.ts";
import type { Planned, RunOptions } from "./run.ts";

interface Common {
  readonly format: Format;
  readonly set: readonly string[];
}

const program = new Command("rankc")
  .description("Compiles a training job written in YAML into one execution plan for all ranks, and runs it.")
  .version(JSON.parse(readPackageFile("package.json")).version)
  .exitOverride()
  .configureOutput({ outputError: (text, write) => write(text) })
  .showSuggestionAfterError();

const withFormat = (command: Command): Command =>
  command.addOption(new Option("--format <format>", "how data is printed").choices(["text", "json"]).default("text"));
const withSet = (command: Command): Command =>
  command.option("--set <path=value>", "change a key of the job as if it were written in the file (repeatable)", collect, []);
const withTarget = (command: Command): Command =>
  command.option("--target <target>", `what the kernels are generated for: ${targetNames.join(", ")}`);
const withExamples = (command: Command, ...lines: string[]): Command =>
  command.addHelpText("after", `\nExamples:\n${lines.map((line) => `  $ rankc ${line}`).join("\n")}`);

withExamples(
  withSet(withFormat(program.command("check").description("check a job: all findings at once"))).argument("<job>", "the job's YAML file"),
  "check job.yaml",
  "check job.yaml --set parallel.tensor=4 --set parallel.sequence=true",
).action(async (path: string, options: Common) => {
  const { findings, job } = await readJobAt(path, options.set);
  const valid = job !== undefined;
  if (options.format === "json") printJson({ valid, ...(await import("../frontend/diagnostic.ts")).shown(findings) });
  else {
    await tellFindings(findings);
    if (valid) printStdout(`${path}: valid`);
  }
  if (!valid) process.exitCode = 1;
});

withExamples(
  withTarget(withSet(withFormat(program.command("compile").description("compile a job into a plan for all ranks"))))
    .argument("<job>", "the job's YAML file")
    .option("-o, --out <dir>", "the directory to write plan.json and plan.txt to")
    .option("--no-cubins", "CUDA: write sources only, which the host compiles with NVRTC")
    .addOption(new Option("--emit <stage>", "print the text of a stage of the compiler").choices(stages)),
  "compile job.yaml -o plan/",
  "compile job.yaml -o plan/ --target cuda:sm_90a",
  "compile job.yaml --emit sharded",
).action(async (path: string, options: Common & { out?: string; emit?: Stage; target?: string; cubins: boolean }) => {
  if (!options.out && !options.emit) throw new Trouble("compile needs -o DIR, or --emit STAGE", "say where the plan goes: -o plan/");
  if (options.out) expectWritableFolder(options.out);
  const compiled = await compileAt(path, options.set, options.target);
  const { sources } = compiled;
  const [plan, cubins] = options.out && options.cubins ? await withCubins(compiled.plan, sources, options.out) : [compiled.plan, new Map()];
  if (options.out) {
    const [{ printPlan }, { printPlanText }] = await Promise.all([import("../plan/seal.ts"), import("../report/planText.ts")]);
    const kernels = [...sources, ...cubins].map(([file, content]) => [join("kernels", file), content] as const);
    writeFolder(options.out, { "plan.json": printPlan(plan), "plan.txt": printPlanText(plan), ...Object.fromEntries(kernels) });
  }
  if (options.emit) return printStdout(compiled.emit(options.emit));
  const { summarize, printSummary } = await import("../report/summary.ts");
  const summary = summarize(plan);
  if (options.format === "json") printJson({ ...summary, out: options.out, findings: compiled.findings });
  else printStdout(`${printSummary(summary)}written to ${join(options.out!, "plan.json")} and plan.txt`);
});

withExamples(
  withSet(withFormat(program.command("inspect").description("show what a plan holds: mesh, memory, collectives and why they exist")))
    .argument("<plan|job>", "a plan (its directory or plan.json), or a job")
    .option("--rank <rank>", "show this rank: its coordinates, its groups, its program", wholeNumber)
    .option("--picture <file>", "draw the schedule and the memory of each stage as an SVG"),
  "inspect plan/",
  "inspect job.yaml --rank 5",
  "inspect job.yaml --picture plan.svg",
).action(async (path: string, options: Common & { rank?: number; picture?: string }) => {
  if (options.picture) expectWritable(options.picture);
  const { plan } = await planAt(path, options.set);
  if (options.picture) {
    const { drawPlan } = await import("../report/planPicture.ts");
    writeFile(options.picture, drawPlan(plan));
  }
  const { inspectPlan, inspectRank, printInspect, printRank } = await import("../report/inspect.ts");
  const json = options.format === "json";
  if (options.rank === undefined) {
    const view = inspectPlan(plan);
    return json ? printJson(view) : printStdout(printInspect(view));
  }
  const { world } = plan.mesh;
  if (options.rank >= world)
    throw new Trouble(`there is no rank ${options.rank}: the plan has ${world}`, `use --rank 0 to --rank ${world - 1}`);
  const view = inspectRank(plan, options.rank);
  return json ? printJson(view) : printStdout(printRank(view));
});

withExamples(
  withSet(
    withFormat(program.command("diff").description("compare two plans or jobs: job keys, summary, instructions; exit 1 if they differ")),
  )
    .argument("<a>", "a plan or a job")
    .argument("<b>", "a plan or a job"),
  "diff plan-a/ plan-b/",
  "diff plan/ job.yaml",
).action(async (a: string, b: string, options: Common) => {
  const [before, after] = await bothPlans(a, b, options.set);
  const { diffPlans, printDiff } = await import("../report/diff.ts");
  const diff = diffPlans(before.plan, after.plan);
  if (options.format === "json") printJson(diff);
  else printStdout(printDiff(diff));
  if (diff.changes) process.exitCode = 1;
});

withExamples(
  withTarget(withSet(withFormat(program.command("run").description("run a plan: train it on this machine"))))
    .argument("<plan|job>", "a plan (its directory or plan.json), or a job")
    .addOption(
      new Option("--backend <backend>", "what computes: cpu and webgpu run all ranks in this process, cuda one process and GPU a rank")
        .choices(["cpu", "webgpu", "cuda"])
        .default("cpu"),
    )
    .option("--steps <n>", "stop after this many steps, those before --resume counted (default: train.steps)", atLeastOne)
    .option("--metrics <file>", "write one JSON line for each step")
    .option("--init-from <file>", "start from the weights of a safetensors file")
    .option("--save <dir>", "write a snapshot at the end, also of a run that is interrupted: weights, optimizer, and how far it was")
    .option("--save-every <n>", "… and after every n steps", atLeastOne)
    .option(
      "--resume <dir>",
      "go on from a snapshot (of a folder of them, the newest), on this mesh or another; auto: from the newest whole one in --save's folder, if there is one",
    )
    .option(
      "--allow-mismatch <key>",
      "let what --resume or --init-from names differ from the job in this key, or in this tensor that the job has no use for (repeatable)",
      collect,
      [],
    )
    .option("--dump-grads <file>", "write the gradients of the last step as safetensors")
    .option("--profile <file>", "print where the time of the last step went, and write a trace for Perfetto (ui.perfetto.dev)")
    .option(
      "--debug-nonfinite",
      "run a step whose loss or gradient norm is not finite again, and name the first instruction that made such a value",
    )
    .option("--no-graph", "CUDA: issue every kernel anew, instead of replaying a step as a graph")
    .option("--data-dir <dir>", "what data.path and data.labels are relative to (default: the directory of the job or plan)"),
  "run job.yaml --steps 20 --metrics metrics.jsonl",
  "run plan/ --data-dir . --init-from model.safetensors",
  "run job.yaml --backend webgpu",
  "run plan/ --backend cuda",
  "run plan/ --save snapshots/ --save-every 500 --resume auto",
).action(async (path: string, options: Common & RunOptions & { target?: string; dataDir?: string }) => {
  const [{ runPlan }, { targetOf }] = await Promise.all([import("./run.ts"), import("../codegen/targetNames.ts")]);
  const planned = await planAt(path, options.set, options.target ?? (planFile(path) ? undefined : targetOf(options.backend)));
  process.exitCode = await runPlan(planned, options.dataDir ?? (isDirectory(path) ? path : dirname(path)), { ...options, leave });
});

withExamples(
  withFormat(program.command("pack").description("put a plan, and all that runs it, into one archive for machines without Node"))
    .argument("<plan>", "a plan (its directory or plan.json)")
    .requiredOption("-o, --out <file>", "the archive to write, a .tar.xz")
    .option(
      "--data-dir <dir>",
      "take the corpus along: what data.path and data.labels are relative to (default: where they are small and beside the plan)",
    )
    .option("--platform <platform>", "the system and processor that it is for, as Node names them (default: this machine's)"),
  "pack plan/ -o tiny.tar.xz",
  "pack plan/ -o tiny.tar.xz --data-dir . --platform linux-x64",
).action(async (plan: string, options: Pick<Common, "format"> & { out: string; dataDir?: string; platform?: string }) => {
  const [{ pack }, { bytesText, plural }] = await Promise.all([import("./pack.ts"), import("../units.ts")]);
  const { format, ...settings } = options;
  const packed = await pack({ plan, ...settings });
  if (format === "json") return printJson(packed);
  printStdout(
    `${packed.out}: ${bytesText(packed.bytes)}, ${plural(packed.files, "file")}, for ${packed.platform}\nsha256 ${packed.sha256}`,
  );
  if (packed.corpus === undefined) printStderr("the corpus is not in it: rankc run needs --data-dir there (or pack it: --data-dir here)");
});

withExamples(
  withTarget(
    withSet(program.command("serve").description("serve a page, to this machine alone, that trains a plan in the browser with WebGPU")),
  )
    .argument("<plan|job>", "a plan (its directory or plan.json), or a job")
    .option("--port <port>", "where the page is, on 127.0.0.1; 0: any port that is free", wholeNumber, 8080)
    .option("--data-dir <dir>", "what data.path and data.labels are relative to (default: the directory of the job or plan)"),
  "serve job.yaml",
  "serve plan/ --data-dir . --port 0",
).action(async (path: string, options: Pick<Common, "set"> & { target?: string; port: number; dataDir?: string }) => {
  const { serve } = await import("./serve.ts");
  const planned = await planAt(path, options.set, options.target ?? (planFile(path) ? undefined : "webgpu"));
  const baseDir = options.dataDir ?? (isDirectory(path) ? path : dirname(path));
  const { address, close } = await serve(planned, { port: options.port, baseDir });
  printStdout(address);
  printStderr("open it in a browser with WebGPU; Ctrl-C ends it");
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => void close());
});

withExamples(
  withFormat(program.command("explain").description("explain a finding's code; without one, list them all")).argument(
    "[code]",
    "for example P101",
  ),
  "explain P101",
  "explain",
).action(async (code: string | undefined, options: Pick<Common, "format">) => {
  const { explainAll, explained, printExplanation } = await import("../frontend/explainText.ts");
  const json = options.format === "json";
  if (code !== undefined) return json ? printJson(explained(code)) : printStdout(printExplanation(explained(code)));
  const all = explainAll().map(({ code, level, title }) => ({ code, level, title }));
  return json ? printJson(all) : printStdout(all.map((e) => `${e.code}  ${e.title}`).join("\n"));
});

withExamples(
  program
    .command("import")
    .description("make a job from a model described elsewhere")
    .command("hf")
    .description("make a job from a Hugging Face config.json (Llama, Mistral, Qwen, Mixtral, OLMoE, DeepSeek)")
    .argument("<config>", "the config.json, or the directory that holds it")
    .option("-o, --out <job>", "the file to write; stdout if not given")
    .option("--mtp", "take multi-token prediction (num_nextn_predict_layers) too, which transformers leaves out"),
  "import hf config.json -o job.yaml",
  "import hf deepseek-v3/config.json --mtp -o job.yaml",
).action(async (path: string, options: { out?: string; mtp?: true }) => {
  const [{ importHfText }, { parseConfig }, { readConfigFile }] = await Promise.all([
    import("../convert/hf.ts"),
    import("../convert/hfReader.ts"),
    import("./inputFiles.ts"),
  ]);
  const { text, file, name } = readConfigFile(path);
  const job = importHfText(parseConfig(text, file), name, { mtp: options.mtp === true });
  if (options.out) writeFile(options.out, job);
  else printStdout(job);
});

withExamples(
  program
    .command("export")
    .description("make what other tools read of a run")
    .command("hf")
    .description("the weights of a snapshot as a Hugging Face checkpoint: one safetensors file, in fp32, under transformers' names")
    .argument("<snapshot>", "a snapshot, or a folder of them, of which the newest")
    .requiredOption("-o, --out <file>", "the .safetensors file to write"),
  "export hf snapshots/ -o model.safetensors",
).action(async (snapshot: string, options: { out: string }) => {
  const [{ openCheckpoint }, { chooseSnapshot }, { toHuggingFace }, { writeSafetensors }] = await Promise.all([
    import("../../runtime/checkpoint/checkpoint.ts"),
    import("../../runtime/checkpoint/saveFolder.ts"),
    import("../../runtime/checkpoint/hf.ts"),
    import("../../runtime/checkpoint/safetensors.ts"),
  ]);
  expectWritable(options.out);
  const { at, notes } = chooseSnapshot(snapshot);
  for (const note of notes) printStderr(`note: ${note}`);
  const { folder, progress, model, whole, close } = openCheckpoint(at);
  try {
    const entries = toHuggingFace(model(), { get: whole });
    writeSafetensors(options.out, entries);
    printStdout(`${options.out}: ${entries.length} tensors of ${folder}, after step ${progress.steps}`);
  } finally {
    close();
  }
});

withExamples(
  withFormat(program.command("doctor").description("say where this machine can run plans, and what to do about what is missing")),
  "doctor",
).action(async (options: Pick<Common, "format">) => {
  const [{ diagnose, printDiagnosis }, { nvccVersion }] = await Promise.all([
    import("../../runtime/doctor.ts"),
    import("../codegen/cubins.ts"),
  ]);
  const diagnosis = await diagnose({ nvcc: nvccVersion() });
  if (options.format === "json") printJson(diagnosis);
  else printStdout(printDiagnosis(diagnosis));
  if (diagnosis.verdict !== "ready") process.exitCode = 3;
});

withExamples(
  program.command("schema").description("print the JSON Schema of a job (draft-07), for editors"),
  "schema > job.schema.json",
).action(async () => {
  const { jobSchema } = await import("../../schemas/job.ts");
  printJson(jobSchema());
});

/** The plan with its kernels compiled, and the cubins by file; the plan as it is where it is not for CUDA, or nvcc is missing. */
async function withCubins(plan: Plan, sources: ReadonlyMap<string, string>, out: string): Promise<[Plan, Map<string, Uint8Array>]> {
  const [kind, arch] = plan.toolchain.target.split(":");
  if (kind !== "cuda") return [plan, new Map()];
  const [{ makeCubins, nvccVersion }, { compileOptions, cubinFile }, { sealCubins }] = await Promise.all([
    import("../codegen/cubins.ts"),
    import("../../runtime/cuda/kernels.ts"),
    import("../plan/seal.ts"),
  ]);
  if (!nvccVersion()) {
    printStderr("nvcc is not here: the host that runs the plan compiles its kernels with NVRTC");
    return [plan, new Map()];
  }
  const units = plan.kernels.map((k) => ({ kernel: k.id, text: sources.get(k.source!.file)!, cubin: cubinFile(k, arch!) }));
  const onProgress = (done: number, of: number): void => printProgress(`nvcc: ${done} of ${of} kernels`);
  const cubins = await makeCubins(units, { arch: arch!, options: compileOptions, onProgress, known: await cubinsAt(out) });
  endProgress();
  return [sealCubins(plan, new Map(units.map(({ kernel, cubin }) => [kernel, { file: cubin, bytes: cubins.get(cubin)! }]))), cubins];
}

/** The cubins of the plan that a directory holds already, where its digests say that they are whole. */
async function cubinsAt(out: string): Promise<(file: string) => Uint8Array | undefined> {
  try {
    const earlier = planFile(out) ? await planAt(out, []) : undefined;
    const found = (earlier?.plan.kernels ?? []).flatMap((k) => k.cubin?.file ?? []).map((file) => [file, earlier?.cubin?.(file)] as const);
    const cubins = new Map(found);
    return (file) => cubins.get(file);
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    // it is about to be replaced
    return () => undefined;
  }
}

async function readJobAt(path: string, sets: readonly string[], target?: string) {
  const [{ readJobFile }, { readJobWith }] = await Promise.all([import("./inputFiles.ts"), import("../frontend/readJob.ts")]);
  const load = async () => {
    const { loadDeviceTargets, loadTarget } = await import("../codegen/targets.ts");
    if (target === undefined || !targetNames.includes(target)) return loadDeviceTargets();
    const loaded = await loadTarget(target);
    return () => loaded;
  };
  return readJobWith(load, readJobFile(path), path, sets);
}

/** An invalid job ends here: its findings are told, and the answer is no. */
class Refused extends Error {}

async function compileAt(path: string, sets: readonly string[], named?: string): Promise<Compiled & { findings: readonly Finding[] }> {
  const target = named ?? "cpu";
  const { job, findings } = await readJobAt(path, sets, named);
  await tellFindings(findings);
  if (!job) throw new Refused();
  const [{ compile }, { loadTarget }, { targetFor }] = await Promise.all([
    import("../compile.ts"),
    import("../codegen/targets.ts"),
    import("../codegen/targetNames.ts"),
  ]);
  return { ...compile(job, { target: await loadTarget(targetFor(target, job)) }), findings };
}

async function planAt(path: string, sets: readonly string[], target?: string): Promise<Planned> {
  const file = planFile(path);
  if (!file) {
    const { plan, sources } = await compileAt(path, sets, target);
    return { plan, source: (name) => sources.get(name)! };
  }
  if (target !== undefined) throw new Trouble(`--target is for jobs; ${path} is a compiled plan`, "name the job, or leave --target out");
  if (sets.length > 0) throw new Trouble(`--set changes a job; ${path} is a compiled plan`, "name the job, or leave --set out");
  const [{ parsePlan }, { readCubin, readKernel, readPlanFile }] = await Promise.all([
    import("../plan/read.ts"),
    import("./inputFiles.ts"),
  ]);
  const plan = parsePlan(readPlanFile(file), file);
  return {
    plan,
    source: (name) => readKernel(plan, dirname(file), name),
    cubin: (name) => readCubin(plan, dirname(file), name),
  };
}

/** For `diff`, 1 means that the plans differ: an invalid job is trouble. --set goes to what is a job. */
async function bothPlans(a: string, b: string, sets: readonly string[]): Promise<[Planned, Planned]> {
  try {
    const own = (path: string): readonly string[] => (planFile(path) && !(planFile(a) && planFile(b)) ? [] : sets);
    return [await planAt(a, own(a)), await planAt(b, own(b))];
  } catch (error) {
    throw error instanceof Refused
      ? new Trouble("an invalid job cannot be compared", "rankc check says the same findings; fix them first")
      : error;
  }
}

/** A plan is named by its directory or by its plan.json; anything else is a job. */
function planFile(path: string): string | undefined {
  if (basename(path) === "plan.json") return existsSync(path) && !isDirectory(path) ? path : undefined;
  const inside = join(path, "plan.json");
  return isDirectory(path) && existsSync(inside) ? inside : undefined;
}

const isDirectory = (path: string): boolean => existsSync(path) && statSync(path).isDirectory();

async function tellFindings(findings: readonly Finding[]): Promise<void> {
  if (findings.length === 0) return;
  const { renderFindings } = await import("../frontend/diagnostic.ts");
  tellStyled(renderFindings(findings, { color: colorful() }));
}

const colorful = (): boolean => Boolean(process.stderr.isTTY) && !process.env.NO_COLOR && process.env.TERM !== "dumb";

function collect(value: string, all: readonly string[]): string[] {
  return [...all, value];
}
function wholeNumber(text: string): number {
  if (!/^\d{1,9}$/.test(text)) throw new InvalidArgumentError("It is not a whole number.");
  return Number(text);
}
function atLeastOne(text: string): number {
  if (wholeNumber(text) === 0) throw new InvalidArgumentError("It must be at least 1.");
  return Number(text);
}

/** A moment for the last words; then the process ends with its exit code, by what is given. */
function leave(end: (code: number) => void): void {
  process.once("exit", end);
  setTimeout(() => process.exit(), 5000).unref();
}

/** Every error becomes a message and an exit code here, and nowhere else. */
function fail(error: unknown): void {
  if (error instanceof CommanderError) {
    process.exitCode = error.exitCode === 0 ? 0 : 2;
  } else if (error instanceof Refused) {
    process.exitCode = 1;
  } else {
    printError(error);
    process.exitCode = error instanceof Trouble ? error.exit : 2;
  }
}

// a reader such as `head` may close the pipe: that is no mistake
for (const stream of [process.stdout, process.stderr]) {
  stream.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code === "EPIPE") process.exit(process.exitCode ?? 0);
    // nothing can be printed where stderr itself fails
    if (stream === process.stdout) printError(unwritten("the standard output", error));
    process.exit(2);
  });
}

await program.parseAsync().catch(fail);
