/** Times in reports: `inspect`, `--why`, `--picture`, `diff` and traces; a calibration reproduces the machine that it measured. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { stringify } from "yaml";
import { calibrated } from "../../src/analysis/estimate/calibrate.ts";
import { calibrationJobs } from "../../src/analysis/estimate/calibrationJobs.ts";
import { type ClassTime, estimate } from "../../src/analysis/estimate/estimate.ts";
import { parseProfile } from "../../src/analysis/estimate/profileFile.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { timingsOf } from "../../src/analysis/estimate/timings.ts";
import { runCommandLine } from "../../src/cli/commandLine.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { diffPlans } from "../../src/report/diff.ts";
import { printDiff } from "../../src/report/diffText.ts";
import { findId } from "../../src/report/findId.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { printOverview } from "../../src/report/overview.ts";
import { drawPlan } from "../../src/report/planPicture.ts";
import { traceOf } from "../../src/report/profile.ts";
import { paint } from "../../src/report/textLayout.ts";
import { explainId } from "../../src/report/why.ts";
import { printWhy } from "../../src/report/whyText.ts";
import { secondsText } from "../../src/units.ts";
import { root } from "../support/checkout.ts";
import { jobOf } from "../support/job.ts";
import { importTrace } from "../support/perfettoImport.ts";
import { rankc } from "../support/rankc.ts";

const profile = packageProfile("h100-80gb")!;
const sm90 = await loadTarget("cuda:sm_90a");
const planOf = (parallel: object) =>
  compile(
    jobOf({
      name: "timed",
      model: { layers: 4, hidden: 256, ffn: 512, heads: 8, vocab: 512, seq: 256, moe: { experts: 8, top_k: 2, ffn: 256 } },
      parallel: { world: 8, ...parallel },
      train: { micro_batch: 1, global_batch: 16, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
      data: { path: "corpus.txt" },
      cluster: { device: "h100-80gb" },
    }),
  ).plan;
const overlapped = {
  name: "overlapped",
  model: { layers: 2, hidden: 256, ffn: 512, heads: 8, vocab: 512, seq: 256 },
  parallel: { world: 4, distributed_optimizer: true, gradient_bucket: 1, parameter_bucket: 1 },
  train: { micro_batch: 1, global_batch: 4, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
  data: { path: "corpus.txt" },
  cluster: { device: "h100-80gb" },
};
const staged = planOf({ pipeline: 2, expert: 4 });
const flat = planOf({ expert: 8 });
const { seconds, simulation, stages } = estimate(staged, { profile });

const folder = mkdtempSync(join(tmpdir(), "rankc-calibrate-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

test("the first screen has the time of a step, what it is made of, and still 40 lines of 80 columns", () => {
  const lines = paint(printOverview(staged, inspectPlan(staged, { profile }), [], 80), false).split("\n");
  expect(lines.length).toBeLessThanOrEqual(40);
  expect(lines.join("\n")).toContain(`time      ${secondsText(seconds)} a step (`);
  expect(lines.join("\n")).toMatch(/waits for ep \d+\.\d %/);
});

test("inspect --comms prints under what each class of communication is hidden, and its JSON has the seconds of all", async () => {
  const path = join(folder, "overlapped.yaml");
  writeFileSync(path, stringify(overlapped));
  const [text, json] = await Promise.all([rankc("inspect", path, "--comms"), rankc("inspect", path, "--comms", "--format", "json")]);
  const [stage] = JSON.parse(json.out).communication;
  const { plan } = compile(jobOf(overlapped), { target: await loadTarget("cuda:sm_90a") });
  expect(stage.classes).toEqual(inspectPlan(plan, { profile }).estimate!.stages[0]!.classes);
  const buckets: ClassTime = stage.classes.find(({ stream }: ClassTime) => stream === "gradients");
  const [longest] = Object.entries(buckets.under);
  expect(text.out).toContain(`${buckets.name} ${buckets.axes}, stream gradients: ${longest![0]} ${secondsText(longest![1])}`);
  // a device without a profile has no seconds
  const none = await rankc("inspect", path, "--comms", "--set", "cluster.device=cpu");
  expect(none).toMatchObject({ exit: 0 });
  expect(none.out).not.toContain("meanwhile");
});

test("diff lists hidden communication that changed", () => {
  const plans = [{}, { gradient_bucket: "none" }].map(
    (more) => compile(jobOf({ ...overlapped, parallel: { ...overlapped.parallel, ...more } })).plan,
  );
  const { summary } = diffPlans(plans[0]!, plans[1]!, { hasProgram: false, profileOf: () => profile });
  const hidden = summary.find(({ what }) => what.startsWith("hidden: reduce_scatter") && what.endsWith("stream gradients"));
  expect(hidden).toMatchObject({ unit: "seconds", new: 0 });
  expect(hidden!.old).toBeGreaterThan(0);
});

test("diff says what a change costs in seconds, before bytes and flops", () => {
  const diff = diffPlans(staged, flat, { hasProgram: false, profileOf: () => profile });
  const time = diff.consequences.find(({ kind }) => kind === "time");
  expect(time).toMatchObject({ old: seconds, new: estimate(flat, { profile }).seconds });
  expect(diff.consequences.findIndex(({ kind }) => kind === "traffic")).toBeGreaterThan(diff.consequences.indexOf(time!));
  expect(diff.summary.filter(({ unit }) => unit === "seconds").map(({ what }) => what)).toContain("time: products");
  expect(printDiff(diff)).toContain(`time of a step: ${secondsText(seconds)} -> `);
});

test("--why says what all equal instructions take in a step", () => {
  const found = findId(staged, "layers.0.moe.permute dispatch");
  const why = explainId(staged, found, profile);
  const axes = stages[0]!.communication.find(({ axes }) => axes === "ep")!;
  expect(why.estimated_seconds_per_step).toBeGreaterThan(0);
  expect(why.estimated_seconds_per_step).toBeLessThan(axes.total);
  const text = printWhy(why, { path: "parallel.expert" }, [], 80).join("\n");
  expect(text).toContain(`${secondsText(why.estimated_seconds_per_step!)} a step by the estimate`);
});

test("the picture draws every block run and the optimizer step in seconds", () => {
  const svg = drawPlan(staged, "light", profile);
  const runs = simulation.stages.flatMap((s) => s.runs);
  expect(svg).toContain("estimated schedule");
  expect(svg.match(/<title>microbatch \d+: (forward|backward), /g)).toHaveLength(runs.length);
  expect(svg.match(/: step, /g)).toHaveLength(2);
  expect(svg).not.toContain("units 0");
});

test("a trace of the estimate has the ids, ops and names of streams of a profile", () => {
  const timings = timingsOf(staged, simulation);
  const streams = new Set(timings.map(({ stream }) => stream));
  expect([...streams].filter((name) => !/^(compute|comm|(send|recv) \d+ .+)$/.test(name))).toEqual([]);
  expect(new Set(timings.map(({ rank }) => rank))).toEqual(new Set([0, 4]));
  const last = timings.reduce((end, t) => Math.max(end, t.end_us), 0);
  expect(last).toBeLessThanOrEqual(1e6 * seconds + 1e-3);
  for (const { begin_us, end_us } of timings) expect(end_us).toBeGreaterThanOrEqual(begin_us);
  const { threads, faults } = importTrace(traceOf(timings));
  expect(faults).toEqual([]);
  expect(threads.reduce((sum, { slices }) => sum + slices.length, 0)).toBe(timings.length);
});

test("export trace --estimate writes the estimate with the tracks of a profile, for the chosen ranks", async () => {
  const out = join(folder, "estimate.trace.json");
  const job = join(root, "plans/tiny-mixtral/job.yaml");
  const { err, exit } = await rankc("export", "trace", job, "-o", out, "--estimate", "--device", "h100-80gb", "--ranks", "0,1");
  expect([err, exit]).toEqual(["", 0]);
  const { threads, faults } = importTrace(readFileSync(out, "utf8"));
  expect(faults).toEqual([]);
  const [first, second] = [0, 1].map((rank) => threads.filter(({ process }) => process === `rank ${rank}, estimate`));
  expect(first?.map(({ thread }) => thread)).toEqual(expect.arrayContaining(["compute", "comm"]));
  const counts = [first, second].map((of) => of?.reduce((sum, { slices }) => sum + slices.length, 0));
  expect(counts[0]).toBeGreaterThan(50);
  expect(counts[1]).toBe(counts[0]);
  expect((await rankc("export", "trace", job, "-o", out, "--estimate")).err).toContain("cpu has no device profile");
});

test("a profile calibrated on simulated steps estimates the plan as the simulated machine runs it", () => {
  const machine = { ...profile, kernels: { ...profile.kernels, clock: 0.5, launch_us: 0 }, overlap: { ...profile.overlap, slowdown: 0 } };
  const real = estimate(flat, { profile: machine });
  const source = { name: "own", device: "h100-80gb", stack: "rankc", from: "a test", date: "2026-11-30" };
  const base = { ...profile, kernels: { ...profile.kernels, launch_us: 0 }, overlap: machine.overlap };
  const own = calibrated(base, [{ plan: flat, steps: [timingsOf(flat, real.simulation)] }], source);
  const again = estimate(flat, { profile: parseProfile(JSON.stringify(own), "own.json") });
  expect(again.sources.measured).toBeGreaterThan(0.95);
  // tables of collectives that the plan lacks, and of groups of other sizes, stay
  for (const [how, rows] of Object.entries(base.links.host.tables ?? {})) {
    const kept = (own.links.host.tables as Record<string, { ranks: number }[]> | undefined)?.[how] ?? [];
    expect(kept.map(({ ranks }) => ranks)).toEqual(expect.arrayContaining(rows.map(({ ranks }) => ranks)));
  }
  expect(Math.abs(again.seconds / real.seconds - 1)).toBeLessThan(0.02);
});

test("compile prints the time of a step where the device has a profile, the one of inspect; its JSON has the seconds", async () => {
  const out = join(folder, "timed");
  const set = ["--set", "model.layers=2", "--set", "cluster.device=h100-80gb"];
  const compiled = await rankc("compile", join(root, "plans/tiny-mixtral/job.yaml"), ...set, "-o", out);
  const line = compiled.out.split("\n").find((l) => l.startsWith("time"));
  expect(line).toMatch(/^time +[0-9.]+ [mµ]?s a step \(.*\), .* tokens\/s/);
  const { estimate: time } = JSON.parse((await rankc("inspect", out, "--format", "json")).out);
  expect(line).toContain(`${secondsText(time.seconds)} a step`);
  const json = JSON.parse((await rankc("compile", join(root, "plans/tiny-mixtral/job.yaml"), ...set, "-o", out, "--format", "json")).out);
  expect(json.estimate).toEqual({ seconds: time.seconds, range: time.range, tokens_per_second: time.tokens_per_second });
  const cpu = await rankc("compile", join(root, "plans/tiny-mixtral/job.yaml"), "-o", join(folder, "untimed"));
  expect(cpu.out).not.toMatch(/^time/m);
});

test("calibrate measures the CPU backend and writes a profile that inspect takes", async () => {
  const out = join(folder, "own.json");
  const job = join(root, "plans/tiny-dense/job.yaml");
  const codes: number[] = [];
  const exit = { setCode: (code: number) => codes.push(code), exitSoon: () => undefined };
  await runCommandLine(["calibrate", job, "--set", "model.layers=1", "--seconds", "1", "-o", out], exit);
  expect(codes).toEqual([0]);
  const own = parseProfile(readFileSync(out, "utf8"), out);
  expect(own.kernels.measured.some(({ op }) => op.startsWith("gemm"))).toBe(true);
  expect(own.sources[0]!.from).toContain("backend cpu");
});

test("the calibration jobs are valid, fit their devices' steps, and have attention of every width and length between 1,024 and 32,768", () => {
  const jobs = calibrationJobs("h200-141gb").map((job) => jobOf(job));
  expect(new Set(jobs.map(({ name }) => name)).size).toBe(jobs.length);
  const widths = jobs.map(({ model }) => (model.mla ? model.mla.nope_dim + model.mla.rope_dim : model.head_dim));
  for (const width of [64, 128, 192, 256]) {
    const lengths = jobs.filter((_, n) => widths[n] === width).map(({ model }) => model.seq);
    expect(Math.max(...lengths) / Math.min(...lengths), `heads of ${width}`).toBeGreaterThanOrEqual(4);
  }
  const rows = jobs.flatMap(({ model: { moe, seq }, train }) => (moe ? [(seq * train.micro_batch * moe.top_k) / moe.experts] : []));
  expect(Math.min(...rows)).toBeLessThanOrEqual(256);
  expect(Math.max(...rows)).toBeGreaterThanOrEqual(2048);
});

test("calibrate without a job names what it needs", async () => {
  expect((await rankc("calibrate", "-o", join(folder, "none.json"))).err).toContain("write --backend cuda, whose jobs are in the package");
  expect((await rankc("calibrate", "--backend", "cuda", "-o", join(folder, "none.json"))).err).toContain("write --device, one of");
  const without = (device: string) => rankc("calibrate", "--backend", "cuda", "--device", device, "-o", join(folder, "none.json"));
  const all = ["calibrate", "--backend", "cuda", "--device", "a10-24gb", "--set", "model.layers=abc", "-o", join(folder, "none.json")];
  expect((await rankc(...all)).err).toContain("correct or omit --set");
  expect((await without("h100")).err).toContain("there is no device h100");
  for (const device of ["cpu", "mi300x-192gb"]) expect((await without(device)).err).toContain(`cuda does not run on ${device}`);
  expect((await without("cpu")).err).not.toContain("mi300x");
});

test("a kernel of the first microbatch is calibrated as one that writes, those of later ones as ones that add", () => {
  const plan = compile(jobOf({ ...overlapped, parallel: { world: 1 } }), { target: sm90 }).plan;
  const run = { plan, steps: [timingsOf(plan, estimate(plan, { profile }).simulation)] };
  const { kernels } = calibrated(profile, [run], { name: "own", device: "h100-80gb", stack: "rankc", from: "a test", date: "2026-11-30" });
  const ops = new Set(kernels.measured.map(({ op }) => op));
  expect([...ops]).toEqual(expect.arrayContaining(["gemm_wgrad", "gemm_wgrad adds"]));
});
