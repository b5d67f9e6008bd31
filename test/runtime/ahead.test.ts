/**
 * A step may be issued while the step before it runs: the device then has work when that one ends. Numbers, errors, requests to stop and
 * times are those of steps one by one, and nothing reads a state that no step left.
 */
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import type { LocalRanks } from "../../runtime/backend.ts";
import { openCpu } from "../../runtime/cpu/backend.ts";
import { type Run, type RunInputs, runOn, type StepResult } from "../../runtime/train/loop.ts";
import { StepFault } from "../../runtime/train/nonfinite.ts";
import type { Plan } from "../../schemas/plan.ts";
import { RunEnd } from "../../src/cli/runEnd.ts";
import { compile } from "../../src/compile.ts";
import { jobOf } from "../support/job.ts";
import { random } from "../support/opCases.ts";

const planOf = (train: object = {}): Plan =>
  compile(
    jobOf({
      name: "ahead",
      model: { layers: 1, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8 },
      train: {
        ...{ micro_batch: 1, global_batch: 4, steps: 8, precision: "fp32", init: { std: 0.2 } },
        ...{ optimizer: { lr: 1e-2, schedule: "cosine", decay_steps: 8 }, metrics: { parameter_norm: true }, ...train },
      },
      // labels: the plan takes weights of tokens, one of which can be NaN
      data: { path: "corpus.txt", labels: "labels.i32" },
    }),
  ).plan;
const plain = planOf();

/** Batches by the number of sequences before them; at `bad` sequences a weight is not finite. */
const batches =
  ({ model }: Plan["job"], bad?: number) =>
  (first: number, rows: number) => {
    const next = random(first + 1);
    const size = rows * model.seq;
    const ids = () => Int32Array.from({ length: size }, () => Math.floor((next() + 1) * 127.9));
    const weights = new Float32Array(size).fill(1 / size);
    if (first === bad) weights[0] = Number.NaN;
    return { ids: ids(), labels: ids(), weights };
  };

const laterTurn = () => new Promise<void>((resolve) => setImmediate(resolve));

/** Ranks that take work in order. Step n ends when `ends[n]` resolves, by default in a later turn of the event loop. */
function ranksInOrder(plan: Plan, { canBeginAhead = true } = {}) {
  const cpu = openCpu(plan);
  const journal: string[] = [];
  const ends: (() => Promise<void>)[] = [];
  let begun = 0;
  const localRanks: LocalRanks = {
    ...cpu,
    readsInOrder: true,
    canBeginAhead: () => canBeginAhead,
    beginStep: () => {
      begun++;
      return false;
    },
    async finish() {
      const own = begun;
      journal.push(`issue ${own}`);
      await cpu.finish();
      await (ends[own] ?? laterTurn)();
      journal.push(`end ${own}`);
    },
  };
  return { localRanks, journal, ends };
}

/** Opens a run on such ranks. */
function runWith(plan: Plan, inputs: Partial<RunInputs> = {}, how: Parameters<typeof ranksInOrder>[1] = {}) {
  const ranks = ranksInOrder(plan, how);
  return { ...ranks, run: runOn(plan, { localRanks: ranks.localRanks, batch: batches(plan.job), ...inputs }) };
}
/** Runs steps 1 to `count`, each of which the next follows directly unless `between` says that something happens after it. */
async function stepsOf(run: Run, count: number, between: readonly number[] = []): Promise<StepResult[]> {
  const steps: StepResult[] = [];
  const detailed = (n: number) => n % 3 === 0;
  for (let n = 1; n <= count; n++)
    steps.push(
      await run.step({ detailed: detailed(n), next: n < count && !between.includes(n) ? { detailed: detailed(n + 1) } : undefined }),
    );
  return steps;
}
const numbersOf = (steps: readonly StepResult[]) => steps.map(({ seconds: _, data_wait_seconds: __, ...numbers }) => numbers);
const never = () => new Promise<void>(() => {});

test("the next step is issued before the end of this one is awaited, with the numbers of steps one by one", async () => {
  const [ahead, alone] = [runWith(plain), runWith(plain, {}, { canBeginAhead: false })];
  const between = [4];
  const until = async (line: string) => {
    while (!ahead.journal.includes(line)) await laterTurn();
  };
  for (const n of [1, 2, 3, 5]) ahead.ends[n] = () => until(`issue ${n + 1}`);
  const [got, want] = [await stepsOf(ahead.run, 6, between), await stepsOf(alone.run, 6, between)];
  expect(numbersOf(got)).toEqual(numbersOf(want));
  expect(new Set(got.map(({ loss }) => loss)).size).toBe(6);
  expect(await ahead.run.parameters()).toEqual(await alone.run.parameters());
  expect(ahead.run.progress()).toEqual(alone.run.progress());
  expect(alone.journal).toEqual([1, 2, 3, 4, 5, 6].flatMap((n) => [`issue ${n}`, `end ${n}`]));
  // nothing is issued behind step 4, after which something happens
  const wanted = "issue 1, issue 2, end 1, issue 3, end 2, issue 4, end 3, end 4, issue 5, issue 6, end 5, end 6";
  expect(ahead.journal.join(", ")).toBe(wanted);
});

test("a batch that grows: the step after the growth has its size, and its learning rate", async () => {
  const plan = planOf({ batch_rampup: { start: 2, increment: 2, samples: 4 } });
  const [ahead, alone] = [runWith(plan), runWith(plan, {}, { canBeginAhead: false })];
  const [got, want] = [await stepsOf(ahead.run, 5), await stepsOf(alone.run, 5)];
  expect(new Set(got.map(({ tokens }) => tokens)).size).toBe(2);
  expect(numbersOf(got)).toEqual(numbersOf(want));
});

test("a step that depends on the numbers of the one before it is issued after them: fp16, on_nonfinite skip", async () => {
  for (const train of [{ precision: "fp16" }, { on_nonfinite: "skip" }]) {
    const { run, journal } = runWith(planOf(train));
    await stepsOf(run, 3);
    expect(journal.join(", ")).toBe("issue 1, end 1, issue 2, end 2, issue 3, end 3");
  }
});

test("while a step is issued ahead nothing reads the state", async () => {
  const { run } = runWith(plain);
  await run.step({ next: {} });
  expect(run.isAhead()).toBe(true);
  const buffer = plain.programs[0]!.buffers.find(({ kind }) => kind === "parameter")!;
  for (const read of [() => run.read(0, buffer), () => run.parameters(), () => run.gradients(), () => run.evaluate("validation")])
    await expect(read()).rejects.toThrow("rankc: step 2 is issued: the devices have the state of no step");
  expect(() => run.skipStep()).toThrow("step 2 is issued");
  await expect(run.step({ detailed: true })).rejects.toThrow("the step was issued with other options");
  await run.step();
  expect(run.isAhead()).toBe(false);
  expect((await run.parameters()).size).toBeGreaterThan(0);
});

test("a step that is not finite ends the run with its number, also with a step behind it, and no state is read after it", async () => {
  const { run, journal, ends } = runWith(plain, { batch: batches(plain.job, 4) });
  const progress = () => run.progress();
  let isBehindEnded = false;
  ends[3] = async () => {
    await new Promise((resolve) => setTimeout(resolve, 20));
    isBehindEnded = true;
  };
  await run.step({ next: {} });
  const before = progress();
  const fault = await run.step({ next: {} }).catch((error: unknown) => error);
  expect(fault).toBeInstanceOf(StepFault);
  expect(fault).toMatchObject({ exit: 2, message: "step 2: the loss is NaN; the step changed no weights, and the run ends" });
  // no work is in flight
  expect([isBehindEnded, journal.at(-1)]).toEqual([true, "end 3"]);
  expect(progress()).toEqual(before);
  const ended = "rankc: the run ended at step 2 with the next step issued: the devices have the state of no step";
  await expect(run.parameters()).rejects.toThrow(ended);
  await expect(run.step()).rejects.toThrow(ended);
  expect(() => run.expectBetweenSteps()).toThrow(ended);
});

test("an error of the data is that of the step which needs it", async () => {
  const good = batches(plain.job);
  const batch = (first: number, rows: number) => {
    if (first === 8) throw new Error("the disk is gone");
    return good(first, rows);
  };
  const { run } = runWith(plain, { batch });
  expect((await run.step({ next: {} })).step).toBe(1);
  expect((await run.step({ next: {} })).step).toBe(2);
  await expect(run.step({ next: {} })).rejects.toThrow("the disk is gone");
});

test("a step that fails on the device ends the run at once, before and after the next one is issued", async () => {
  const lost = () => Promise.reject(new Error("the device is lost"));
  const { run, ends } = runWith(plain);
  ends[1] = lost;
  await expect(run.step({ next: {} })).rejects.toThrow("the device is lost");
  const later = runWith(plain);
  later.ends[2] = lost;
  await later.run.step({ next: {} });
  // nothing awaits it yet, and that is no unhandled rejection
  await new Promise(setImmediate);
  await expect(later.run.step({ next: {} })).rejects.toThrow("the device is lost");
});

test("the time of a step that was issued ahead begins at the end of the step before it", async () => {
  const { run } = runWith(plain);
  const first = performance.now();
  const steps = [await run.step({ next: {} })];
  const ended = performance.now();
  // the host does something else, beside the device
  await new Promise((resolve) => setTimeout(resolve, 30));
  steps.push(await run.step({ next: {} }), await run.step());
  const last = performance.now();
  const [one = 0, ...others] = steps.map(({ seconds }) => 1000 * seconds);
  expect(one).toBeLessThanOrEqual(ended - first);
  const sum = others.reduce((a, b) => a + b, 0);
  expect(sum).toBeGreaterThanOrEqual(29);
  expect(one + sum).toBeLessThanOrEqual(last - first);
});

test("the wait for data is that of the step which needed them, also if the next step is issued before the end is awaited", async () => {
  const good = batches(plain.job);
  const slow = (first: number, rows: number) => {
    const until = performance.now() + 10;
    while (performance.now() < until);
    return good(first, rows);
  };
  const { run } = runWith(plain, { batch: slow });
  // the device of these ranks has ended when the batch is there
  const waits = (await stepsOf(run, 4)).map(({ data_wait_seconds }) => data_wait_seconds);
  for (const wait of waits) expect(wait).toBeGreaterThanOrEqual(0.01);
  const busy = runWith(plain, { batch: slow });
  for (const n of [1, 2, 3, 4]) busy.ends[n] = () => new Promise((resolve) => setTimeout(resolve, 60));
  const [, ...others] = (await stepsOf(busy.run, 4)).map(({ data_wait_seconds }) => data_wait_seconds);
  expect(others).toEqual([0, 0, 0]);
});

describe("with the time of steps", () => {
  beforeEach(() => {
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "performance"] });
  });
  afterEach(() => {
    vi.useRealTimers();
  });
  const second = () => new Promise<void>((resolve) => setTimeout(resolve, 1000));

  /** Runs step 1, and begins step 2; each takes a second of the device. */
  async function secondOfTwo() {
    const opened = runWith(plain);
    opened.ends.push(...Array.from({ length: 5 }, () => second));
    const one = opened.run.step();
    await vi.advanceTimersByTimeAsync(1000);
    await one;
    expect(opened.run.mayBegin()).toBe(true);
    return { ...opened, two: opened.run.step({ next: {} }) };
  }

  test("a long step is followed by the next one shortly before its expected end: a request to stop before that ends the run after it", async () => {
    const { run, journal, two } = await secondOfTwo();
    await vi.advanceTimersByTimeAsync(900);
    run.stop();
    await vi.advanceTimersByTimeAsync(100);
    expect((await two).step).toBe(2);
    expect([run.isAhead(), run.mayBegin(), journal.at(-1)]).toEqual([false, false, "end 2"]);
    expect((await run.parameters()).size).toBeGreaterThan(0);
  });

  test("a request to stop after that ends the run after the next one", async () => {
    const { run, journal, two } = await secondOfTwo();
    await vi.advanceTimersByTimeAsync(975);
    expect(journal).not.toContain("issue 3");
    await vi.advanceTimersByTimeAsync(10);
    expect(journal).toContain("issue 3");
    run.stop();
    await vi.advanceTimersByTimeAsync(100);
    await two;
    expect([run.isAhead(), run.mayBegin()]).toEqual([true, true]);
    const three = run.step({ next: {} });
    await vi.advanceTimersByTimeAsync(2000);
    expect([(await three).step, run.isAhead(), run.mayBegin()]).toEqual([3, false, false]);
  });

  test("a device that fails meanwhile ends the wait", async () => {
    const { run, ends } = runWith(plain);
    ends.push(second, second, async () => {
      await new Promise((resolve) => setTimeout(resolve, 10));
      throw new Error("the device is lost");
    });
    const one = run.step();
    await vi.advanceTimersByTimeAsync(1000);
    await one;
    const failed = expect(run.step({ next: {} })).rejects.toThrow("the device is lost");
    await vi.advanceTimersByTimeAsync(10);
    await failed;
    expect(vi.getTimerCount()).toBe(0);
  });

  test("a run never waits for a step that does not end to issue the next one", async () => {
    const { run, ends, journal } = runWith(plain);
    ends.push(never, never, never);
    void run.step({ next: {} });
    await vi.advanceTimersByTimeAsync(0);
    await laterTurn();
    expect(journal).toEqual(["issue 1", "issue 2"]);
  });

  test("a time limit is decided on when a step begins that the next is issued behind, and for both of them", async () => {
    /** Runs steps of one second on ranks that issue ahead or not, with a limit of so many seconds. Returns the steps, and the seconds they took. */
    const stepsWithin = async (limit: number, canBeginAhead: boolean) => {
      const { run, ends } = runWith(plain, {}, { canBeginAhead });
      let device = Promise.resolve();
      ends.push(...Array.from({ length: 20 }, () => () => (device = device.then(second))));
      const begun = performance.now();
      const end = new RunEnd(begun / 1000 + limit);
      end.watch(run);
      const train = async (): Promise<void> => {
        for (let n = 1; run.mayBegin(); n++) {
          // something happens after step 2, so that nothing is issued behind it
          const { seconds } = await run.step({ next: n === 2 ? undefined : { beforeAhead: () => end.beforeAhead(0) } });
          end.afterStep(seconds, 0, run.isAhead());
        }
      };
      const trained = train();
      // turns of the event loop take no time
      for (let n = 0; n < 130; n++) {
        await vi.advanceTimersByTimeAsync(50);
        for (let turn = 0; turn < 3; turn++) await laterTurn();
      }
      await trained;
      end.close();
      expect(end.reason?.by).toBe("time limit");
      return run.progress().steps;
    };
    for (const limit of [2.5, 3.5, 4.5, 5.5]) {
      expect(await stepsWithin(limit, true), `${limit} s`).toBe(Math.floor(limit));
      expect(await stepsWithin(limit, false), `${limit} s`).toBe(Math.floor(limit));
    }
  });
});
