/** `rankc run`: trains step by step in this process, or starts one process for each rank and forwards what they say. */
import type { StepResult } from "../../runtime/train/loop.ts";
import type { RunSettings } from "../../runtime/train/openRun.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { plural } from "../units.ts";
import { version } from "../version.ts";
import { endProgress, type Format, printError, printJson, printProgress, printStderr, printStdout } from "./output.ts";
import { expectWritable, openLines, writeFile } from "./outputFiles.ts";

export interface RunOptions {
  readonly format: Format;
  readonly backend: "cpu" | "webgpu" | "cuda";
  readonly steps?: number;
  readonly metrics?: string;
  readonly initFrom?: string;
  readonly save?: string;
  readonly saveEvery?: number;
  readonly resume?: string;
  readonly allowMismatch?: readonly string[];
  readonly dumpGrads?: string;
  readonly profile?: string;
  readonly graph: boolean;
  readonly debugNonfinite?: boolean;
  /** The process is to end soon, and by this, whatever its device is in the midst of. */
  readonly leave: (end: (code: number) => void) => void;
}

/** What a run needs of a plan: itself, and its kernels by the name of their file. */
export interface Planned {
  readonly plan: Plan;
  source(file: string): string;
  cubin?(file: string): Uint8Array | undefined;
}

/** Runs a plan here; with CUDA and many ranks, in a process for each, unless this is one of them. Answers with the exit code. */
export async function runPlan(planned: Planned, baseDir: string, options: RunOptions): Promise<number> {
  const { plan } = planned;
  if (options.save !== undefined) (await import("../../runtime/checkpoint/saveFolder.ts")).expectWritableFolder(options.save);
  if (options.backend === "cuda" && plan.mesh.world > 1) {
    if (options.dumpGrads !== undefined)
      throw new Trouble("--dump-grads needs all ranks in one process", "use --backend cpu or webgpu, or leave it out");
    const [{ isLoopback, placeOf }, { launch }] = await Promise.all([
      import("../../runtime/launch/place.ts"),
      import("../../runtime/launch/launcher.ts"),
    ]);
    const place = placeOf(process.env, plan.mesh.world);
    if (place?.rank === 0 && !place.secret && !isLoopback(place.address)) printStderr(noSecret);
    if (!place) {
      const [command, args] = [process.execPath, [...process.execArgv, ...process.argv.slice(1)]];
      const say = (stream: "stdout" | "stderr", line: string): void => (stream === "stdout" ? printStdout(line) : printStderr(line));
      const { code, failed } = await launch({ command, args, ranks: plan.mesh.world, env: process.env, onLine: say });
      if (failed) printStderr(`rankc: rank ${failed.rank} ${failed.how}`);
      return code;
    }
  }
  return train(planned, baseDir, options);
}

const noSecret = `rankc: warning: neither RANKC_TOKEN nor RANKC_TOKEN_FILE is set: whoever reaches rank 0 over the network can compute this run's token
  fix: set RANKC_TOKEN_FILE to a file that all hosts share and nobody else reads (openssl rand -hex 32 > FILE)`;

/** An interrupt lets the step in hand finish, then ends with what was done; where the run saves, that is saved. */
async function train({ plan, source, cubin }: Planned, baseDir: string, options: RunOptions): Promise<number> {
  const [{ openRun }, { StepFault }, { metricsLine, progressLine, duration }] = await Promise.all([
    import("../../runtime/train/openRun.ts"),
    import("../../runtime/train/nonfinite.ts"),
    import("./progress.ts"),
  ]);
  const steps = options.steps ?? plan.job.train.steps;
  if (options.saveEvery !== undefined && options.save === undefined)
    throw new Trouble("--save-every says when, and nothing says where", "name a folder: --save snapshots/");
  // of several processes one writes metrics, and its host may be the only one that has the folder
  const metricsHere = options.backend !== "cuda" || plan.mesh.world === 1 ? options.metrics : undefined;
  for (const path of [options.dumpGrads, options.profile, metricsHere]) if (path !== undefined) expectWritable(path);
  const settings: RunSettings = {
    ...{ backend: options.backend, source, baseDir, version, graph: options.graph, profile: options.profile !== undefined },
    debugNonfinite: options.debugNonfinite ?? false,
    ...(cubin && { cubin }),
    ...(options.initFrom && { initFrom: options.initFrom }),
    ...(options.save && { save: options.save }),
    ...(options.resume && { resume: options.resume }),
    ...(options.allowMismatch && { allowMismatch: options.allowMismatch }),
  };
  const run = await openRun(plan, settings);
  if (run.leads) for (const note of run.notes) printStderr(`note: ${note}`);
  const metrics =
    options.metrics === undefined || !run.leads ? undefined : openLines(options.metrics, run.progress().steps === 0 ? "new" : "append");
  let interrupted = false;
  const interrupt = (): void => {
    interrupted = true;
    run.stop();
  };
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, interrupt);
  let done = 0;
  let saved: { readonly done: number; readonly folder: string } | undefined;
  /** All processes of a run come here after the same step. */
  const save = async (): Promise<void> => {
    if (options.save === undefined || done === (saved?.done ?? 0)) return;
    saved = { done, folder: await run.save() };
    if (run.leads) printProgress(`saved ${saved.folder}`);
  };
  let seconds = 0;
  let skipped = 0;
  let last: StepResult | undefined;
  let failed: Error | undefined;
  let fault: InstanceType<typeof StepFault> | undefined;
  try {
    const before = run.progress().steps;
    if (before >= steps)
      throw new Trouble(`the snapshot is of step ${before}, and the run ends at step ${steps}`, `--steps ${2 * before} goes on`);
    while (run.progress().steps < steps && run.mayBegin()) {
      last = await run.step();
      done++;
      seconds += last.seconds;
      skipped += Number(last.skipped ?? false);
      metrics?.add(metricsLine(last));
      if (run.leads) printProgress(progressLine(last, steps, seconds / done));
      if (options.saveEvery !== undefined && last.step % options.saveEvery === 0) await save();
      // a step on the CPU leaves no gap for signals: this is one
      await new Promise(setImmediate);
    }
    await save();
    if (done > 0 && run.leads) endProgress();
    if (options.dumpGrads !== undefined && done > 0) {
      const [{ writeSafetensors }, { toHuggingFace }] = await Promise.all([
        import("../../runtime/checkpoint/safetensors.ts"),
        import("../../runtime/checkpoint/hf.ts"),
      ]);
      writeSafetensors(options.dumpGrads, toHuggingFace(plan.job.model, await run.gradients()));
    }
    if (options.profile !== undefined && done > 0) {
      const [timings, { printProfile, traceOf }] = [await run.profile(), await import("../report/profile.ts")];
      writeFile(run.leads ? options.profile : `${options.profile}.rank${timings[0]?.rank}`, traceOf(timings));
      if (run.leads) printStderr(printProfile(plan, timings));
    }
  } catch (error) {
    // all processes stand after the same step: they end like a run that is done
    if (error instanceof StepFault) fault = error;
    else failed = error as Error;
    if (failed && options.backend === "cuda") options.leave((await import("../../runtime/cuda/hardExit.ts")).hardExit());
    if (failed) throw failed;
  } finally {
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.removeListener(signal, interrupt);
    metrics?.close();
    // what went wrong first is what is told
    await run.close(failed).catch((error) => (failed ? printError(error) : Promise.reject(error)));
  }
  if (fault && done > 0 && run.leads) endProgress();
  // one process of many says it, and one that found where it comes from
  if (fault && (run.leads || fault.origin !== undefined)) throw fault;
  if (fault) return fault.exit;
  if (!run.leads) return interrupted ? 130 : 0;
  if (interrupted) printStderr(`interrupted: ${done} of ${steps} steps were done`);
  if (options.format === "json")
    printJson({ steps: done, skipped, interrupted, seconds, loss: last?.loss, mtp_loss: last?.mtp_loss, saved: saved?.folder });
  else {
    const ahead = last?.mtp_loss === undefined ? "" : `, mtp loss ${last.mtp_loss.toFixed(4)}`;
    printStdout(
      `${plural(done, "step")} in ${duration(seconds)}${skipped > 0 ? `, ${skipped} skipped` : ""}, loss ${last?.loss.toFixed(4) ?? "unknown"}${ahead}`,
    );
  }
  return interrupted ? 130 : 0;
}
