import { type Command, InvalidArgumentError, Option } from "commander";
import { type BackendName, backendNames, backends } from "../../runtime/backends.ts";
import { type Device, deviceNames, deviceOf } from "../../schemas/devices.ts";
import { entryOf } from "../../schemas/lookup.ts";
import type { Plan } from "../../schemas/plan.ts";
import type { Timing } from "../../schemas/timing.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { CalibrationRun } from "../analysis/estimate/calibrate.ts";
import { profileFor } from "./deviceProfile.ts";
import { launchRanks } from "./launchRanks.ts";
import { compileJob, type LoadedPlan, loadPlan, readJobText } from "./loadPlan.ts";
import { type JobOptions, type ProcessExit, planOrJob, withExamples, withSet, withTarget } from "./options.ts";
import { printStderr, printStdout } from "./output.ts";
import { expectWritable, writeFile } from "./outputFiles.ts";

interface CalibrateOptions extends JobOptions {
  readonly out: string;
  readonly backend: BackendName;
  readonly device?: string;
  readonly base?: string;
  readonly target?: string;
  readonly seconds: number;
}

/** Steps that are measured at most. */
const STEPS = 5;
/** Steps before them, in ms: power lowers the clock of a device that is busy. */
const WARM_MS = 600;

/** Registers `calibrate`: runs a plan on this machine and writes the device profile of its kernels and links. */
export function registerCalibrate(program: Command, exit: ProcessExit): void {
  withExamples(
    withTarget(withSet(program.command("calibrate")))
      .description(
        "measure the kernels and collectives of a plan on this machine, and write a device profile for estimates; without a plan, kernels of the shapes that models have",
      )
      .argument("[plan|job]", planOrJob)
      .requiredOption("-o, --out <file>", "the profile to write")
      .addOption(new Option("--backend <name>", "the backend that is measured").choices(backendNames).default("cpu"))
      .option("--device <name>", "without a plan: the device of this machine, as cluster.device names it")
      .option("--base <profile>", "the profile that what is not measured is taken from (default: that of cluster.device, or of an H100)")
      .option("--seconds <n>", "begin no further step after so many seconds", seconds, 115),
    "calibrate --device h200-141gb --backend cuda -o own.json",
    "calibrate job.yaml -o own.json",
    "calibrate plan/ --backend cuda -o own.json && rankc inspect plan/ --time --device own.json",
  ).action(async (path: string | undefined, options: CalibrateOptions) => {
    expectWritable(options.out);
    if (path === undefined) return exit.setCode(await measure(options, undefined));
    if (options.device !== undefined)
      throw new Trouble("--device is for calibrate without a job", "the job names its device: cluster.device");
    const { target } = backends[options.backend];
    if (target.name === null && options.target === undefined && !isPlan(path)) throw new Trouble(target.found, target.fix);
    const loaded = await loadPlan(path, options, isPlan(path) ? undefined : (options.target ?? target.name ?? undefined));
    exit.setCode((await launchRanks(loaded.plan, options.backend)) ?? (await measure(options, loaded)));
  });
}

const isPlan = (path: string): boolean => !/\.ya?ml$/.test(path);

function seconds(text: string): number {
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value) || value <= 0) throw new InvalidArgumentError("Write seconds above 0, for example 90.");
  return value;
}

/** A plan to measure, with the reader of its kernels. */
type Measured = Pick<LoadedPlan, "plan" | "source" | "cubin">;

/** Runs the steps of a plan, or of the jobs of the package, on random tokens and writes the profile. Returns the exit code. */
async function measure(options: CalibrateOptions, own: Measured | undefined): Promise<number> {
  const [{ calibrated }, { version }] = await Promise.all([import("../analysis/estimate/calibrate.ts"), import("../version.ts")]);
  const device = own?.plan.job.cluster.device ?? deviceNamed(options);
  const base = (await profileFor(device, options.base)) ?? (await profileFor("h100-80gb"));
  if (!base) throw new Trouble(`${device} has no profile`, "name one with --base");
  const started = performance.now();
  const isOver = (): boolean => performance.now() - started > 1000 * options.seconds;
  const runs: CalibrationRun[] = [];
  let leads = true;
  for await (const measured of own ? [own] : packageJobs(device, options)) {
    if (runs.length > 0 && isOver()) break;
    const run = await timedSteps(measured, options.backend, version, isOver);
    leads &&= run.leads;
    runs.push({ plan: measured.plan, steps: run.steps });
  }
  const [first] = runs;
  if (!first) {
    const isChanged = options.set.length + options.overlay.length > 0;
    throw new Trouble(`no job of the package can run on ${device}`, isChanged ? "correct or omit --set and -f" : "name a job");
  }
  if (runs.every(({ steps }) => steps.length === 0))
    throw new Trouble(`the backend ${options.backend} has no clock for kernels here`, "measure another backend", 3);
  const { plan } = first;
  const profile = calibrated(base, runs, {
    name: own ? plan.job.name.replace(/[^A-Za-z0-9_.-]/g, "-").slice(0, 80) : `${device}.own`,
    device,
    stack: `rankc ${version}, ${plan.toolchain.target}`,
    from: `rankc calibrate on ${process.platform}, backend ${options.backend}`,
    date: new Date().toISOString().slice(0, 10),
  });
  if (leads) {
    writeFile(options.out, `${JSON.stringify(profile, null, 1)}\n`);
    const kernels = `${profile.kernels.measured.length} kernels${own ? "" : ` of ${runs.length} jobs`}`;
    printStdout(`${kernels} measured in ${((performance.now() - started) / 1000).toFixed(0)} s; written to ${options.out}\n`);
  }
  return 0;
}

/** Compiles the jobs of the package for a device, one after the other. Jobs that the device has no room for are left out. */
async function* packageJobs(device: Device, options: CalibrateOptions): AsyncGenerator<Measured> {
  const { calibrationJobs } = await import("../analysis/estimate/calibrationJobs.ts");
  const target = options.target ?? deviceOf(device).target;
  for (const { name, ...job } of calibrationJobs(device)) {
    const { job: read, findings } = await readJobText(JSON.stringify({ name, ...job }), name, options, target);
    if (!read) {
      printStderr(`calibrate: ${name} is left out: ${findings[0]?.found ?? "it is no valid job"}`);
      continue;
    }
    printStderr(`calibrate: ${name}`);
    const { plan, sources } = await compileJob(read, target);
    yield { plan, source: (file) => entryOf(sources, file, "source") };
  }
}

/** Runs steps until the device is warm, and then those whose instructions are timed. */
async function timedSteps(
  { plan, source, cubin }: Measured,
  backend: BackendName,
  version: string,
  isOver: () => boolean,
): Promise<{ readonly leads: boolean; readonly steps: readonly (readonly Timing[])[] }> {
  const { runOn } = await import("../../runtime/train/loop.ts");
  const settings = { source, ...(cubin && { cubin }), version, profile: true, graph: false };
  const localRanks = await backends[backend].open(plan, settings);
  const run = runOn(plan, { localRanks, batch: randomBatch(plan) });
  const steps: (readonly Timing[])[] = [];
  try {
    // the first step compiles and allocates
    await run.step();
    const begun = performance.now();
    while (performance.now() - begun < WARM_MS && !isOver()) await run.step();
    while (steps.length < STEPS && !(steps.length > 0 && isOver())) {
      await run.step();
      const timings = await run.profile();
      if (timings.length === 0) break;
      steps.push(timings);
    }
  } finally {
    await run.close();
  }
  return { leads: run.leads, steps };
}

/** Returns the device whose jobs are measured. */
function deviceNamed({ backend, device }: CalibrateOptions): Device {
  if (backends[backend].target.name !== null)
    throw new Trouble(
      `calibrate has no job to measure on ${backend}`,
      "write --backend cuda, whose jobs are in the package and have the sizes of models, or name a job",
    );
  const known = deviceNames.filter((name) => deviceOf(name).target.startsWith("cuda:"));
  const found = known.find((name) => name === device);
  if (found) return found;
  const isNamed = deviceNames.some((name) => name === device);
  const fault = isNamed ? `${backend} does not run on ${device}` : `there is no device ${device}`;
  throw new Trouble(device === undefined ? "calibrate needs a job or a device" : fault, `write --device, one of ${known.join(", ")}`);
}

/** Returns batches of random tokens: what a kernel takes must not depend on tokens that repeat. */
const randomBatch =
  ({ programs, job: { model } }: Plan) =>
  (first: number, rows: number) => {
    const depths = new Set(programs.flatMap(({ inputs }) => inputs.map(({ depth }) => depth)));
    let state = (first + 1) >>> 0;
    const tokens = (): Int32Array =>
      Int32Array.from({ length: rows * model.seq }, () => {
        // Numerical Recipes' linear congruential generator
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
        return (state >>> 8) % model.vocab;
      });
    const ones = new Float32Array(rows * model.seq).fill(1);
    const further = [...depths].flatMap((depth) =>
      depth === undefined
        ? []
        : [[`ids_${depth}`, tokens()] as const, [`labels_${depth}`, tokens()] as const, [`weights_${depth}`, ones] as const],
    );
    const documents = new Int32Array(rows * model.seq);
    const fixed = { ids: tokens(), labels: tokens(), weights: ones, documents, aux_weight: new Float32Array([1]) };
    return { ...fixed, ...Object.fromEntries(further) };
  };
