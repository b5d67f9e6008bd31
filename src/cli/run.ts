/** `rankc run`: trains in this process, or starts one process per rank and forwards their output. */
import { type Command, Option } from "commander";
import { type BackendName, backendNames, backends } from "../../runtime/backends.ts";
import type { Saved } from "../../runtime/checkpoint/saver.ts";
import { StartupClock } from "../../runtime/startup.ts";
import type { EvaluationResult, Run, StepResult } from "../../runtime/train/loop.ts";
import type { OpenRun, RunSettings } from "../../runtime/train/openRun.ts";
import type { Plan } from "../../schemas/plan.ts";
import type { StartupSeconds } from "../../schemas/startup.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { plural } from "../units.ts";
import { version } from "../version.ts";
import { targetOf } from "./eval.ts";
import { evaluateAtEnd, evaluateWithin } from "./evaluations.ts";
import { launchRanks, runsOneOfSeveral } from "./launchRanks.ts";
import { dataDirOf, type LoadedPlan, loadPlan, planFile } from "./loadPlan.ts";
import type { Dashboard } from "./log/dashboard.ts";
import type { RunLog } from "./log/runLog.ts";
import {
  atLeastOne,
  type CommonOptions,
  collect,
  dataDirHelp,
  type ProcessExit,
  planOrJob,
  stepRanges,
  withExamples,
  withFormat,
  withSet,
  withTarget,
} from "./options.ts";
import {
  endProgress,
  isTerminal,
  occasionalProgress,
  printError,
  printFrame,
  printJson,
  printStderr,
  printStdout,
  terminalColumns,
} from "./output.ts";
import { expectWritable, expectWritableFolder, openLines, writeFile } from "./outputFiles.ts";
import { RunEnd, withTimeLimit } from "./runEnd.ts";
import { expectSaveFolder, RunSaves, type SaveOptions, saveErrorChoices } from "./runSaves.ts";
import { RunTotals, type StepsOptions, trainSteps } from "./trainSteps.ts";

interface RunOptions extends CommonOptions, SaveOptions, StepsOptions {
  readonly backend: BackendName;
  readonly steps?: number;
  readonly metrics?: string;
  readonly initFrom?: string;
  readonly timeLimit?: number;
  readonly allowMismatch?: readonly string[];
  readonly dumpGrads?: string;
  readonly profile?: string;
  readonly graph: boolean;
  readonly debugNonfinite?: boolean;
  readonly only?: "weights";
  readonly exitAfter?: number;
}

/** Registers `run`: trains a plan. The exit code after an early end is that of `RunEnd`. */
export function registerRun(program: Command, exit: ProcessExit): void {
  withExamples(
    withCheckpointOptions(
      withTimeLimit(withTarget(withSet(withFormat(program.command("run").description("run a plan: train it on this machine")))))
        .argument("<plan|job>", planOrJob)
        .addOption(
          new Option(
            "--backend <backend>",
            `the backend: ${backendNames.map((name) => `${name} (${backends[name].description})`).join(", ")}`,
          )
            .choices(backendNames)
            .default(backendNames[0]),
        )
        .option("--steps <n>", "stop after step n; steps before --resume count (default: train.steps)", atLeastOne)
        .option("--exit-after <n>", "stop after n steps of this process; a later --resume goes on", atLeastOne)
        .option("--skip-steps <steps>", "steps whose data is read over without training, such as 100-110,250", stepRanges)
        .option("--metrics <file>", "write one JSON line per step")
        .option("--log <dir>", "write the log of the run: TensorBoard event files, metrics.csv, metrics.jsonl")
        .option("--dashboard", "on a terminal: draw loss, speed, memory, balance of experts and evaluations in place of the progress line")
        .option("--log-interval <n>", "steps between two lines of the log, and of the progress in a file", atLeastOne, 1),
    )
      .option("--dump-grads <file>", "write the gradients of the last step as safetensors")
      .option("--profile <file>", "print a time profile of the last step, and write a trace for Perfetto (ui.perfetto.dev)")
      .option(
        "--debug-nonfinite",
        "repeat a step whose loss or gradient norm is not finite, and report the first instruction with a non-finite output",
      )
      .option("--no-graph", "CUDA: launch each kernel, instead of replaying a step as a CUDA graph")
      .option("--data-dir <dir>", dataDirHelp),
    "run job.yaml --steps 20 --metrics metrics.jsonl",
    "run plan/ --data-dir . --init-from model.safetensors",
    "run job.yaml --backend webgpu",
    "run plan/ --backend cuda",
    "run plan/ --save checkpoints/ --save-every 500 --keep 3 --resume auto",
    "run plan/ --save checkpoints/ --resume auto --time-limit 3h55m",
  ).action(async (path: string, options: RunOptions & { target?: string; dataDir?: string }) => {
    const loaded = await loadPlan(path, options, options.target ?? (planFile(path) ? undefined : targetOf(options.backend)));
    exit.setCode(await runPlan(loaded, options.dataDir ?? dataDirOf(path), options, exit));
  });
}

/** Adds the options that read and write checkpoints. */
const withCheckpointOptions = (command: Command): Command =>
  command
    .option("--init-from <file>", "start from the weights of a safetensors file")
    .option("--save <dir>", "write a checkpoint at the end of the run, also after an early end: weights, optimizer state, run progress")
    .option("--save-every <n>", "also write a checkpoint after every n steps, while training continues", atLeastOne)
    .option("--keep <n>", "keep the newest n checkpoints: older ones are removed when a new one is complete (default: all)", atLeastOne)
    .addOption(
      new Option(
        "--on-save-error <action>",
        "what follows when a checkpoint cannot be written; the checkpoints before it stay. The last checkpoint of a run must succeed",
      )
        .choices(saveErrorChoices)
        .default(saveErrorChoices[0]),
    )
    .option(
      "--resume <dir>",
      "resume from a checkpoint, or from the newest in a folder, on the same mesh or another; auto: from the newest complete checkpoint in the --save folder, or from step 0 if there is none",
    )
    .addOption(
      new Option("--only <part>", "with --resume: read the weights alone; optimizer, steps and data start from the beginning").choices([
        "weights",
      ]),
    )
    .option(
      "--allow-mismatch <key>",
      "accept that the source of --resume or --init-from differs from the job in this key, or has this tensor in addition (repeatable)",
      collect,
      [],
    );

/**
 * Runs a plan and returns the exit code. If a process of the backend runs one rank and the plan has several, it starts one process per rank, unless this process is one of them.
 * Throws a Trouble.
 */
async function runPlan(loaded: LoadedPlan, baseDir: string, options: RunOptions, exit: ProcessExit): Promise<number> {
  const { plan } = loaded;
  if (options.save !== undefined) (await import("../../runtime/checkpoint/saveFolder.ts")).expectWritableFolder(options.save);
  if (options.dumpGrads !== undefined && runsOneOfSeveral(plan, options.backend))
    throw new Trouble("--dump-grads needs all ranks in one process", "use --backend cpu or webgpu, or omit --dump-grads");
  return (await launchRanks(plan, options.backend)) ?? train(loaded, baseDir, options, exit);
}

/**
 * Trains until the last step, or an early end by a signal or the time limit: then the current step completes, and `--save` writes its
 * checkpoint. Returns the exit code.
 */
async function train(loaded: LoadedPlan, baseDir: string, options: RunOptions, exit: ProcessExit): Promise<number> {
  const { plan } = loaded;
  const startup = new StartupClock();
  const [{ openRun }, { StepFault }, { SaveFault }, { evaluationLine, evaluationText }] = await Promise.all([
    import("../../runtime/train/openRun.ts"),
    import("../../runtime/train/nonfinite.ts"),
    import("../../runtime/checkpoint/commit.ts"),
    import("./progress.ts"),
  ]);
  const steps = options.steps ?? plan.job.train.steps;
  expectSaveFolder(options);
  // one process of several writes metrics; the folder may exist on its host alone
  const metricsHere = backends[options.backend].ranks === "all" || plan.mesh.world === 1 ? options.metrics : undefined;
  if (options.log !== undefined) expectWritableFolder(options.log);
  for (const path of [options.dumpGrads, options.profile, metricsHere]) if (path !== undefined) expectWritable(path);
  startup.end("plan");
  const end = new RunEnd(options.timeLimit);
  const run = await openRun(plan, { ...settingsOf(loaded, baseDir, options), startup, onProgress: occasionalProgress() }).catch(
    (error: unknown) => {
      end.close();
      throw error;
    },
  );
  end.watch(run);
  const last = Math.min(steps, run.progress().steps + (options.exitAfter ?? Number.POSITIVE_INFINITY));
  if (run.leads) for (const note of run.notes) printStderr(`note: ${note}`);
  const metrics =
    options.metrics === undefined || !run.leads ? undefined : openLines(options.metrics, run.progress().steps === 0 ? "new" : "append");
  const log = options.log === undefined ? undefined : await openLog(run, plan, { ...options, log: options.log });
  const dashboard = options.dashboard && run.leads && isTerminal() ? await openDashboard(plan, last) : undefined;
  const saves = new RunSaves(run, options, (error) => error instanceof SaveFault);
  const totals = new RunTotals();
  let failed: Error | undefined;
  let fault: InstanceType<typeof StepFault> | undefined;
  let evaluations: readonly EvaluationResult[] = [];
  const onEvaluation = (result: EvaluationResult): void => {
    metrics?.add(evaluationLine(result));
    log?.addEvaluation(result);
    dashboard?.addEvaluation(result);
    if (dashboard) printFrame(dashboard.frame(terminalColumns()));
    else {
      endProgress();
      printStderr(evaluationText(result));
    }
  };
  try {
    await trainSteps({ run, job: plan.job, options, steps: last, saves, end, totals, startup, metrics, log, dashboard, onEvaluation });
    await saves.finish();
    if (totals.done > 0 && run.leads) endProgress();
    if (totals.done > 0) await writeResults(run, plan, options);
    if (totals.done > 0 && run.progress().steps >= last)
      evaluations = await (last === steps ? evaluateAtEnd : evaluateWithin)(run, plan.job, last, onEvaluation);
  } catch (error) {
    // all processes throw a StepFault after the same step, so they close like a run that is complete
    if (error instanceof StepFault) fault = error;
    else failed = error as Error;
    const hardExit = failed && (await backends[options.backend].hardExit?.());
    if (hardExit) exit.exitSoon(hardExit);
    if (failed) throw failed;
  } finally {
    end.close();
    metrics?.close();
    // report the first error; an error of close() follows from it
    await run.close(failed).catch((error) => (failed ? printError(error) : Promise.reject(error)));
  }
  if (fault && totals.done > 0 && run.leads) endProgress();
  // the leading process reports the fault, and so does the process that located its origin
  if (fault && (run.leads || fault.origin !== undefined)) throw fault;
  if (fault) return fault.exit;
  const { reason } = end;
  const endedBy = run.progress().steps < last ? (reason?.by ?? "another rank") : undefined;
  // the leading process ends last, and states for all how the run ended
  if (!run.leads) return 0;
  if (endedBy)
    printStderr(
      `${endedBy === "time limit" ? "the time limit has come" : "interrupted"}: ${run.progress().steps} of ${last} steps were done`,
    );
  await printResult({ ...totals.result(), startup: startup.seconds(), endedBy, saved: saves.saved, evaluations }, options.format);
  return endedBy ? (reason?.code ?? OTHER_RANK_CODE) : 0;
}

/** The exit code of a run that another rank's signal ended: that of an interrupt. */
const OTHER_RANK_CODE = 130;

async function openDashboard(plan: Plan, steps: number): Promise<Dashboard> {
  const [{ Dashboard }, { planNumbers }] = await Promise.all([import("./log/dashboard.ts"), import("./log/scalars.ts")]);
  return new Dashboard({ name: plan.job.name, steps, plan: planNumbers(plan) });
}

/** Opens the log of a run in the process that leads. A log of which nothing can be written ends the run before its first step. */
async function openLog(run: OpenRun, plan: Plan, { log, logInterval }: RunOptions & { readonly log: string }): Promise<RunLog | undefined> {
  if (!run.leads) return undefined;
  try {
    const { openRunLog } = await import("./log/runLog.ts");
    return openRunLog(plan, { folder: log, interval: logInterval, steps: run.progress().steps });
  } catch (error) {
    await run.close(error as Error).catch(() => {});
    throw error;
  }
}

/** Returns the settings of a run from the options of the command. */
const settingsOf = ({ source, cubin }: LoadedPlan, baseDir: string, options: RunOptions): RunSettings => ({
  ...{ backend: options.backend, source, baseDir, version, graph: options.graph, profile: options.profile !== undefined },
  debugNonfinite: options.debugNonfinite ?? false,
  ...(cubin && { cubin }),
  ...(options.initFrom && { initFrom: options.initFrom }),
  ...(options.save && { save: options.save }),
  ...(options.resume && { resume: options.resume }),
  ...(options.only && { only: options.only }),
  ...(options.keep !== undefined && { keep: options.keep }),
  ...(options.allowMismatch && { allowMismatch: options.allowMismatch }),
});

/** Writes the gradients and the profile of the last step where options ask for them. */
async function writeResults(run: Run, plan: Plan, options: RunOptions): Promise<void> {
  if (options.dumpGrads !== undefined) {
    const [{ writeSafetensors }, { toHuggingFace }] = await Promise.all([
      import("../../runtime/checkpoint/safetensors.ts"),
      import("../../runtime/checkpoint/hf.ts"),
    ]);
    writeSafetensors(options.dumpGrads, toHuggingFace(plan.job.model, await run.gradients()));
  }
  if (options.profile !== undefined) {
    const [timings, { printProfile, traceOf }] = [await run.profile(), await import("../report/profile.ts")];
    writeFile(run.leads ? options.profile : `${options.profile}.rank${timings[0]?.rank}`, traceOf(timings));
    if (run.leads) printStderr(printProfile(plan, timings));
  }
}

/** What a run did. */
interface RunResult {
  readonly done: number;
  readonly skipped: number;
  readonly endedBy: string | undefined;
  readonly seconds: number;
  readonly startup: StartupSeconds;
  readonly last: StepResult | undefined;
  readonly saved: Saved | undefined;
  readonly evaluations: readonly EvaluationResult[];
}

async function printResult(
  { done, skipped, endedBy, seconds, startup, last, saved, evaluations }: RunResult,
  format: RunOptions["format"],
): Promise<void> {
  const heldOut = Object.fromEntries(evaluations.map(({ part, ...result }) => [part, result]));
  if (format === "json") {
    const checkpoint = { saved: saved?.folder, save_seconds: saved?.seconds, save_stall_seconds: saved?.stallSeconds };
    const { loss, mtp_loss } = last ?? {};
    const ended = { interrupted: endedBy !== undefined, ended_by: endedBy };
    printJson({ steps: done, skipped, ...ended, seconds, startup_seconds: startup, loss, mtp_loss, ...checkpoint, ...heldOut });
    return;
  }
  const { duration } = await import("./progress.ts");
  const ahead = last?.mtp_loss === undefined ? "" : `, mtp loss ${last.mtp_loss.toFixed(4)}`;
  const skips = skipped > 0 ? `, ${skipped} skipped` : "";
  printStdout(`${plural(done, "step")} in ${duration(seconds)}${skips}, loss ${last?.loss.toFixed(4) ?? "unknown"}${ahead}`);
}
