/** The early end of a run from the command line: it is saved, its exit code says why, and the next run continues; and what a full disk does. */
import { spawn } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { RunEnd } from "../../src/cli/runEnd.ts";
import { fixture } from "../support/job.ts";
import { builtCli, rankcProcess } from "../support/rankc.ts";
import { byTier, full } from "../support/tiers.ts";

const place = mkdtempSync(join(tmpdir(), "rankc-end-"));
const job = join(place, "job.yaml");
beforeAll(() => {
  writeFileSync(join(place, "corpus.txt"), readFileSync(fixture("corpus.txt")));
  writeFileSync(
    job,
    `name: end
model: {layers: 1, hidden: 16, heads: 2, vocab: 256, seq: 8}
train: {global_batch: 2, steps: 100000, precision: fp32, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`,
  );
});
afterAll(() => rmSync(place, { recursive: true, force: true }));

/** Runs until its first step, then sends a signal, twice: as batch systems do whose launcher forwards it. */
function interrupted(signal: NodeJS.Signals, ...args: string[]): Promise<{ code: number | null; err: string; out: string }> {
  const child = spawn(process.execPath, [builtCli(), "run", job, "--format", "json", ...args]);
  const printed = { err: "", out: "" };
  child.stdout.on("data", (chunk) => (printed.out += chunk));
  child.stderr.on("data", (chunk) => {
    const first = !printed.err.includes("step ");
    printed.err += chunk;
    if (!first || !printed.err.includes("step ")) return;
    child.kill(signal);
    setTimeout(() => child.kill(signal), 20);
  });
  return new Promise((resolve) => child.on("close", (code) => resolve({ code, ...printed })));
}

const signals = [
  ["SIGTERM", 143],
  ["SIGUSR1", 138],
] as const;
for (const { options, rows } of byTier(signals, ([signal]) => signal === "SIGTERM"))
  test.each(rows)("%s ends a run after the step, saved, with exit code %d; --resume auto continues", options, async (signal, exit) => {
    const folder = join(place, signal);
    const { code, err, out } = await interrupted(signal, "--save", folder, "--resume", "auto");
    expect(err).toMatch(/interrupted: \d+ of 100000 steps were done/);
    expect(code).toBe(exit);
    const { steps, ended_by, saved } = JSON.parse(out);
    expect([ended_by, saved]).toEqual([signal, join(folder, `step-${String(steps).padStart(8, "0")}`)]);
    const next = await rankcProcess("run", job, "--save", folder, "--resume", "auto", "--steps", String(steps + 1), "--format", "json");
    expect(next.err).toContain(`resumed from ${saved}`);
    expect(JSON.parse(next.out)).toMatchObject({ steps: 1, interrupted: false });
    const again = await rankcProcess("run", job, "--save", folder, "--resume", "auto", "--steps", String(steps + 1), "--format", "json");
    expect([again.exit, again.err]).toEqual([0, expect.stringContaining(`the run is complete: the checkpoint is of step ${steps + 1}`)]);
    expect(JSON.parse(again.out)).toMatchObject({ steps: 0, interrupted: false });
  });

test("signals within a second are one request; a later one has its default action, which ends the process", () => {
  vi.useFakeTimers();
  const stop = vi.fn();
  const end = new RunEnd(undefined);
  end.watch({ stop });
  const listener = process.listeners("SIGUSR1").at(-1);
  listener?.("SIGUSR1");
  vi.advanceTimersByTime(999);
  expect(process.listeners("SIGUSR1")).toContain(listener);
  listener?.("SIGUSR1");
  expect([stop.mock.calls.length, end.reason]).toEqual([1, { by: "SIGUSR1", code: 138 }]);
  vi.advanceTimersByTime(1);
  expect(process.listeners("SIGUSR1")).not.toContain(listener);
  vi.useRealTimers();
});

test("--time-limit ends a run before the limit, saved, with exit code 124", async () => {
  const folder = join(place, "limit");
  const begun = performance.now();
  const { exit, err, out } = await rankcProcess("run", job, "--save", folder, "--time-limit", "3s", "--format", "json");
  expect([exit, err]).toEqual([124, expect.stringContaining("the time limit has come")]);
  expect(JSON.parse(out)).toMatchObject({ ended_by: "time limit", saved: expect.stringContaining("step-") });
  // the limit is of the process; its end may wait for a busy machine
  expect(performance.now() - begun).toBeGreaterThan(1000);
  for (const wrong of ["3", "h", "0s", "3h 5m"])
    expect((await rankcProcess("run", job, "--time-limit", wrong)).err).toContain("it is not a duration");
});

/** Runs with a limit of the size of files, which fails writes as a full disk does. */
function limited(kilobytes: number, ...args: string[]): Promise<{ code: number | null; err: string }> {
  const command = `ulimit -f ${kilobytes}; exec "$0" "$@"`;
  const child = spawn("bash", ["-c", command, process.execPath, builtCli(), "run", job, ...args], {
    env: { ...process.env, RANKC_CACHE: "off" },
  });
  let err = "";
  child.stderr.on("data", (chunk) => (err += chunk));
  child.stdout.resume();
  return new Promise((resolve) => child.on("close", (code) => resolve({ code, err })));
}

test("a checkpoint that cannot be written ends the run with one error; with --on-save-error continue at its end", full, async () => {
  const options = ["--save-every", "2", "--steps", "5"];
  const stop = await limited(20, "--save", join(place, "stop"), ...options);
  expect([stop.code, stop.err]).toEqual([2, expect.stringContaining("step-00000002: cannot be written: the file exceeds the size")]);
  expect(stop.err).not.toContain("step 5/5");
  const on = await limited(20, "--save", join(place, "on"), ...options, "--on-save-error", "continue");
  expect(on.code).toBe(2);
  for (const step of [2, 4])
    expect(on.err).toMatch(new RegExp(`step-0000000${step}: cannot be written.*the run continues without this checkpoint`));
  expect(on.err).toContain("step 5/5");
  for (const folder of ["stop", "on"]) expect(readdirSync(join(place, folder))).toEqual([]);
  expect((await rankcProcess("run", job, "--keep", "2")).err).toContain("--keep needs --save");
});
