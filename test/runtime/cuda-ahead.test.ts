/**
 * Runs on the CUDA backend before a stand-in for the driver, whose streams run late: steps that are issued while the step before them runs
 * give the numbers, the evaluations and the checkpoints of steps that are issued one by one.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { openCpu } from "../../runtime/cpu/backend.ts";
import type { CudaRanks } from "../../runtime/cuda/backend.ts";
import type { Context, Event, Stream } from "../../runtime/cuda/driver.ts";
import { together } from "../../runtime/cuda/rank.ts";
import { Waits } from "../../runtime/cuda/waits.ts";
import { freePort } from "../../runtime/launch/launcher.ts";
import { timesOf } from "../../runtime/launch/rendezvous.ts";
import { StartupClock } from "../../runtime/startup.ts";
import { type EvaluationResult, type Run, runOn, type StepResult } from "../../runtime/train/loop.ts";
import type { OpenRun, RunSettings } from "../../runtime/train/openRun.ts";
import type { Plan } from "../../schemas/plan.ts";
import { RunEnd } from "../../src/cli/runEnd.ts";
import { RunSaves } from "../../src/cli/runSaves.ts";
import { RunTotals, trainSteps } from "../../src/cli/trainSteps.ts";
import { cpu } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { moe, planOf, type Ranks, standInRanks } from "../support/cudaRanks.ts";
import { asCuda, bytesAt, imagesOf, type Kernels, noCompiler, withCubins } from "../support/cudaStandIn.ts";
import { fixture, jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";
import { built } from "../support/rankc.ts";

// compiled, the threads of its ranks start in a fraction of the time
const { join: meet }: typeof import("../../runtime/launch/rendezvous.ts") = await import(built("runtime/launch/rendezvous.ts"));

const place = mkdtempSync(join(tmpdir(), "rankc-cuda-ahead-"));
let cuda: Ranks;
let openRun: (plan: Plan, settings: RunSettings) => Promise<OpenRun>;
beforeAll(async () => {
  if (noCompiler) return;
  cuda = await standInRanks();
  // opens the backend whose driver is the stand-in
  ({ openRun } = await import("../../runtime/train/openRun.ts"));
});
afterAll(() => {
  rmSync(place, { recursive: true, force: true });
  vi.unstubAllEnvs();
});

const planWith = (train: object = {}, data: object = {}): Plan =>
  compile(
    jobOf({
      name: "cuda ahead",
      model: { layers: 1, hidden: 16, heads: 2, vocab: 256, seq: 8, moe },
      train: {
        ...{ micro_batch: 1, global_batch: 4, steps: 20, precision: "bf16", init: { std: 0.2 } },
        ...{ optimizer: { lr: 1e-2, schedule: "cosine", decay_steps: 20 }, metrics: { parameter_norm: true }, ...train },
      },
      data: { path: "corpus.txt", ...data },
    }),
    { target: { ...cpu, writesFirst: true } },
  ).plan;

/** Opens a run on the stand-in. */
async function open(reference: Plan, settings: Partial<RunSettings> = {}): Promise<OpenRun> {
  const { plan, kernels } = asCuda(reference);
  cuda.serve(kernels);
  const own = withCubins(plan);
  return openRun(own, { backend: "cuda", baseDir: fixture(""), cubin: imagesOf(own).cubin, version: "test", ...settings });
}
test("a device that is closed ends its waits: no event is asked about that is no more", async () => {
  let [asked, isClosed] = [0, false];
  const happened = () => {
    if (isClosed) throw new Error("an event of a closed context");
    asked++;
    return false;
  };
  const context = { happened } as unknown as Context;
  const waits = new Waits(context, {} as Stream, () => undefined);
  const read = waits.happens({} as Event);
  await new Promise(setImmediate);
  waits.close();
  isClosed = true;
  await expect(read).rejects.toThrow("the device was closed while it was waited for");
  expect(asked).toBeGreaterThan(0);
});

const quiet = { metrics: undefined, log: undefined, dashboard: undefined } as const;

describe.skipIf(noCompiler)(`with a stand-in for the driver${noCompiler}`, () => {
  test("a run with a log, evaluations, checkpoints and skipped steps has the same numbers and files; all other steps are issued ahead", async () => {
    const train = { evaluation: { every: 7, steps: 1 }, batch_rampup: { start: 2, increment: 2, samples: 8 } };
    const plan = planWith(train, { split: [9, 1] });
    const trained = async (name: string, isAhead: boolean) => {
      cuda.seed(7);
      const folder = join(place, name);
      const run = await open(plan, { save: folder });
      const steps: StepResult[] = [];
      const evaluations: EvaluationResult[] = [];
      const ahead: number[] = [];
      const watched: OpenRun = {
        ...run,
        async step(options) {
          const step = await run.step(isAhead ? options : { ...options, next: undefined });
          if (run.isAhead()) ahead.push(step.step + 1);
          steps.push(step);
          return step;
        },
      };
      const end = new RunEnd(undefined);
      const options = {
        logInterval: 5,
        log: "log",
        skipSteps: [[13, 13]] as const,
        saveEvery: 6,
        save: folder,
        onSaveError: "stop",
      } as const;
      const saves = new RunSaves(watched, options, (_): _ is never => false);
      await trainSteps({
        ...{ run: watched, job: plan.job, steps: 20, options, saves, end, totals: new RunTotals(), startup: new StartupClock(), ...quiet },
        onEvaluation: (result) => evaluations.push(result),
      });
      await saves.finish();
      end.close();
      await run.close();
      const files = readdirSync(folder).map((step) => [
        step,
        readFileSync(join(folder, step, "rank-00000.safetensors")).toString("base64"),
      ]);
      const numbers = steps.map(({ seconds: _, data_wait_seconds: __, memory_bytes: ___, ...rest }) => rest);
      return { numbers, evaluations: evaluations.map(({ seconds: _, ...rest }) => rest), files, ahead };
    };
    const [got, want] = [await trained("ahead", true), await trained("alone", false)];
    expect(cuda.complaint()).toBeUndefined();
    expect(got.numbers).toEqual(want.numbers);
    expect(new Set(got.numbers.map(({ loss }) => loss)).size).toBe(19);
    expect(got.evaluations).toEqual(want.evaluations);
    expect(got.evaluations.map(({ step }) => step)).toEqual([7, 14]);
    expect(got.files.map(([step]) => step)).toEqual(["step-00000006", "step-00000012", "step-00000018", "step-00000020"]);
    expect(got.files).toEqual(want.files);
    expect(want.ahead).toEqual([]);
    // of each batch size, and of logged steps (5, 10, 15, 20), the first step is issued call by call and the second is captured; something
    // happens after 6, 12 and 18 (a checkpoint), 7 and 14 (an evaluation), and 13 is skipped
    expect(got.ahead).toEqual([3, 4, 9, 11, 12, 16, 17, 18, 20]);
  });

  test("a step that is not finite ends the run with a step issued behind it: no later checkpoint is written, and the last one is whole", async () => {
    const reference = planWith();
    const { plan, kernels } = asCuda(reference);
    const [program] = plan.programs;
    const id = program?.metrics.loss?.[0];
    const writer = program?.chunks
      .flatMap(({ forward }) => forward)
      .find((i) => i.kind === "compute" && Object.values(i.writes).includes(id ?? ""));
    if (writer?.kind !== "compute") throw new Error("no instruction writes the loss");
    const output = Object.keys(writer.reads).length + Object.values(writer.writes).indexOf(id ?? "");
    let launched = 0;
    const steps = 4;
    const spoilt =
      (name: string): Kernels[string] =>
      (params, launch) => {
        kernels[name]?.(params, launch);
        // the loss of the first microbatch of step 5
        if (++launched === 4 * steps + 1) new Float32Array(bytesAt(params.getBigUint64(8 * output, true), 4))[0] = Number.NaN;
      };
    const names = [writer.kernel, ...(writer.first_kernel ? [writer.first_kernel] : [])];
    const folder = join(place, "fault");
    const run = await open(reference, { save: folder });
    cuda.serve({ ...kernels, ...Object.fromEntries(names.map((name) => [name, spoilt(name)])) });
    for (let n = 1; n <= steps; n++) {
      expect(Number.isFinite((await run.step({ next: n === 3 ? undefined : {} })).loss)).toBe(true);
      if (n === 3) await run.save();
    }
    expect(run.isAhead()).toBe(true);
    const fault = await run.step({ next: {} }).catch((error: unknown) => error);
    expect(fault).toMatchObject({ exit: 2, message: "step 5: the loss is NaN; the step changed no weights, and the run ends" });
    expect(run.progress().steps).toBe(4);
    await expect(run.save()).rejects.toThrow("the run ended at step 5 with the next step issued");
    await run.close();
    expect(cuda.complaint()).toBeUndefined();
    expect(readdirSync(folder)).toEqual(["step-00000003"]);
    const resumed = await open(reference, { save: folder, resume: "auto" });
    expect(resumed.progress().steps).toBe(3);
    expect((await resumed.step()).step).toBe(4);
    await resumed.close();
  });

  test("ranks of several processes issue ahead, stop after the same step, and end when one of them fails", async () => {
    const reference = planOf({ world: 2, distributed_optimizer: true }, {}, { global_batch: 4 });
    const batch = (first: number, rows: number) => {
      const next = random(first + 1);
      const ids = () => Int32Array.from({ length: rows * 8 }, () => Math.floor((next() + 1) * 127.9));
      return { ids: ids(), labels: ids() };
    };
    const { plan, kernels } = asCuda(reference);
    cuda.serve(kernels);
    const opened = async (all: readonly CudaRanks[]) => {
      const port = await freePort();
      const times = { ...timesOf({}), timeout: 600, beat: 0.2, lost: 600, hang: 600 };
      const who = { world: 2, port, address: "127.0.0.1", token: "secret", plan: "a".repeat(64), version: "test", times };
      const meetings = await Promise.all(all.map((_, rank) => meet({ ...who, rank })));
      return all.map((own, rank) => {
        const meeting = meetings[rank];
        if (!meeting) throw new Error("no meeting");
        return runOn(plan, { localRanks: together(plan, rank, own, meeting), batch });
      });
    };
    const losses: number[][] = [[], []];
    let wereAhead = 0;
    const runs = await opened(await cuda.openAll(plan));
    const train = async (run: Run, rank: number): Promise<void> => {
      while (run.mayBegin()) {
        const { loss, step } = await run.step({ next: {} });
        losses[rank]?.push(loss);
        wereAhead += Number(run.isAhead());
        if (rank === 1 && step === 6) run.stop();
      }
    };
    await Promise.all(runs.map(train));
    expect(losses[0]).toEqual(losses[1]);
    const steps = losses[0]?.length ?? 0;
    expect(steps).toBeGreaterThanOrEqual(6);
    // all but the first two steps of each rank
    expect(wereAhead).toBe(2 * (steps - 2));
    const want = runOn(reference, { localRanks: openCpu(reference), batch });
    const alone: number[] = [];
    while (alone.length < steps) alone.push((await want.step()).loss);
    expect(losses[0]).toEqual(alone);
    await Promise.all(runs.map((run) => run.close()));

    const [one, other] = await opened(await cuda.openAll(plan));
    if (!one || !other) throw new Error("no runs");
    for (let n = 1; n <= 4; n++) await Promise.all([one.step({ next: {} }), other.step({ next: {} })]);
    expect([one.isAhead(), other.isAhead()]).toEqual([true, true]);
    await other.close(new Error("the disk is full"));
    const goOn = async () => {
      for (let n = 1; n <= 3; n++) await one.step({ next: {} });
    };
    await expect(goOn()).rejects.toThrow("the disk is full");
    await one.close(new Error("rank 1 failed"));
  });
});
