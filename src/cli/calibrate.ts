import { type Command, InvalidArgumentError, Option } from "commander";
import { type BackendName, backendNames, backends } from "../../runtime/backends.ts";
import type { Plan } from "../../schemas/plan.ts";
import type { Timing } from "../../schemas/timing.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { profileFor } from "./deviceProfile.ts";
import { launchRanks } from "./launchRanks.ts";
import { type LoadedPlan, loadPlan } from "./loadPlan.ts";
import { type JobOptions, type ProcessExit, planOrJob, withExamples, withSet, withTarget } from "./options.ts";
import { printStdout } from "./output.ts";
import { expectWritable, writeFile } from "./outputFiles.ts";

interface CalibrateOptions extends JobOptions {
  readonly out: string;
  readonly backend: BackendName;
  readonly base?: string;
  readonly target?: string;
  readonly seconds: number;
}

/** Steps that are measured at most, after one that is not. */
const STEPS = 5;

/** Registers `calibrate`: runs a plan on this machine and writes the device profile of its kernels and links. */
export function registerCalibrate(program: Command, exit: ProcessExit): void {
  withExamples(
    withTarget(withSet(program.command("calibrate")))
      .description("measure the kernels and collectives of a plan on this machine, and write a device profile for estimates")
      .argument("<plan|job>", planOrJob)
      .requiredOption("-o, --out <file>", "the profile to write")
      .addOption(new Option("--backend <name>", "the backend that is measured").choices(backendNames).default("cpu"))
      .option("--base <profile>", "the profile that what is not measured is taken from (default: that of cluster.device, or of an H100)")
      .option("--seconds <n>", "begin no further step after so many seconds", seconds, 90),
    "calibrate job.yaml -o own.json",
    "calibrate plan/ --backend cuda -o own.json && rankc inspect plan/ --time --device own.json",
  ).action(async (path: string, options: CalibrateOptions) => {
    expectWritable(options.out);
    const { target } = backends[options.backend];
    if (target.name === null && options.target === undefined && !isPlan(path)) throw new Trouble(target.found, target.fix);
    const loaded = await loadPlan(path, options, isPlan(path) ? undefined : (options.target ?? target.name ?? undefined));
    exit.setCode((await launchRanks(loaded.plan, options.backend)) ?? (await measure(loaded, options)));
  });
}

const isPlan = (path: string): boolean => !/\.ya?ml$/.test(path);

function seconds(text: string): number {
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value) || value <= 0) throw new InvalidArgumentError("Write seconds above 0, for example 90.");
  return value;
}

/** Runs steps on random tokens and writes the profile. Returns the exit code. */
async function measure({ plan, source, cubin }: LoadedPlan, options: CalibrateOptions): Promise<number> {
  const [{ runOn }, { calibrated }, { version }] = await Promise.all([
    import("../../runtime/train/loop.ts"),
    import("../analysis/estimate/calibrate.ts"),
    import("../version.ts"),
  ]);
  const { device } = plan.job.cluster;
  const base = (await profileFor(device, options.base)) ?? (await profileFor("h100-80gb"));
  if (!base) throw new Trouble(`${device} has no profile`, "name one with --base");
  const started = performance.now();
  const settings = { source, ...(cubin && { cubin }), version, profile: true, graph: false };
  const localRanks = await backends[options.backend].open(plan, settings);
  const run = runOn(plan, { localRanks, batch: randomBatch(plan) });
  const timings: Timing[] = [];
  try {
    for (let step = 0; step <= STEPS; step++) {
      if (step > 1 && performance.now() - started > 1000 * options.seconds) break;
      await run.step();
      // the first step compiles and allocates
      if (step > 0) timings.push(...(await run.profile()));
    }
  } finally {
    await run.close();
  }
  if (timings.length === 0) throw new Trouble(`the backend ${options.backend} has no clock for kernels here`, "measure another backend", 3);
  const profile = calibrated(base, plan, timings, {
    name: plan.job.name.replace(/[^A-Za-z0-9_.-]/g, "-").slice(0, 80),
    device,
    stack: `rankc ${version}, ${plan.toolchain.target}`,
    from: `rankc calibrate on ${process.platform}, backend ${options.backend}`,
    date: new Date().toISOString().slice(0, 10),
  });
  if (run.leads) {
    writeFile(options.out, `${JSON.stringify(profile, null, 1)}\n`);
    const { measured } = profile.kernels;
    printStdout(
      `${measured.length} kernels measured in ${((performance.now() - started) / 1000).toFixed(0)} s; written to ${options.out}\n`,
    );
  }
  return 0;
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
