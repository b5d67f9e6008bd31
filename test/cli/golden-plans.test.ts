/** The worked examples: each job compiles to the plan.txt beside it. `npm run plans` updates them. */
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { printPlanText } from "../../src/report/planText.ts";
import { peakOf } from "../../src/rules/all.ts";
import { root } from "../support/checkout.ts";
import { deepseekSets, jobAt, planBytes, scaledJob } from "../support/scale.ts";
import { full, isFull, once } from "../support/tiers.ts";

const names = readdirSync(join(root, "plans"));
const elsewhere = mkdtempSync(join(tmpdir(), "rankc-plans-"));
afterAll(() => rmSync(elsewhere, { recursive: true, force: true }));

function planOf(path: string) {
  const { job, findings } = readJob(readFileSync(path, "utf8"), path);
  expect(findings.filter((f) => f.level === "error")).toEqual([]);
  return compile(job!).plan;
}

/** The plan of each example, compiled at the first use. */
const plans = new Map(names.map((name) => [name, once(() => planOf(join(root, "plans", name, "job.yaml")))]));

/** Large plans take seconds each: in the fast tier one for two nodes, and one with latent attention for 1,024 ranks. */
const largeInFast = ["mixtral-8x7b-16gpu", "deepseek-v3-1024gpu"];

describe.each(names)("plans/%s", (name) => {
  const path = join(root, "plans", name, "job.yaml");
  const plan = plans.get(name)!;
  const isLarge = /\d+gpu/.test(name);
  const tier = isLarge && !largeInFast.includes(name) ? full : {};

  test("is the plan that its plan.txt shows", tier, async () => {
    await expect(printPlanText(plan())).toMatchFileSnapshot(join(root, "plans", name, "plan.txt"));
  });

  test("a buffer has the layer that its id names", tier, () => {
    const named = plan().programs.flatMap((program) => program.buffers.map(({ id }) => /layers\.(\d+)\./.exec(id)?.[1]));
    const layers = plan().programs.flatMap((program) => program.buffers.map(({ layer }) => layer?.toString()));
    expect(layers).toEqual(named);
  });

  test("has the same bytes when compiled again, and from another path", isLarge ? full : {}, () => {
    const copy = join(elsewhere, `${name}.yaml`);
    cpSync(path, copy);
    expect(printPlan(planOf(copy)) === printPlan(plan())).toBe(true);
  });
});

const tiny = names.filter((name) => name.startsWith("tiny-"));
// the oracles, laws and the README train in the fast tier
test.each(tiny)("plans/%s trains", full, async (name) => {
  const run = await openRun(planOf(join(root, "plans", name, "job.yaml")), { baseDir: join(root, "plans", name) });
  const losses: number[] = [];
  for (let step = 0; step < 4; step++) losses.push((await run.step()).loss);
  await run.close();
  // bytes begin at ln 256, and these learn which of them are letters
  expect(losses[0]).toBeGreaterThan(5.3);
  expect(losses[3]).toBeLessThan(losses[0]! - 0.3);
});

test("the plan of mixtral-8x7b-16gpu has less than 8 MB", () => {
  expect(Buffer.byteLength(printPlan(plans.get("mixtral-8x7b-16gpu")!()))).toBeLessThan(8e6);
});

test(
  "mixtral-8x7b-16gpu has Megatron's defaults for arguments that the launch script lacks, and its variants need what the file states",
  full,
  () => {
    const { model, parallel, train } = jobAt("mixtral-8x7b-16gpu", {});
    expect(parallel).toMatchObject({ tensor: 4, expert: 4, expert_tensor: 4, data: 4 });
    expect([model.rope.theta, model.vocab, train.optimizer.betas[1]]).toEqual([1e4, 32_256, 0.999]);
    const gib = (sets: Readonly<Record<string, unknown>>) => (peakOf(jobAt("mixtral-8x7b-16gpu", sets)).bytes / 2 ** 30).toFixed(1);
    const whole = { "parallel.expert_tensor": 1, "parallel.expert": 8 };
    expect(gib({})).toBe("63.8");
    expect(gib({ "parallel.expert_tensor": 1 })).toBe("110.7");
    expect(gib(whole)).toBe("79.1");
    expect(gib({ ...whole, "parallel.pipeline": 2 })).toBe("62.2");
  },
);

test("a model shaped like DeepSeek-V3 is compiled for 2,048 and for 16,384 ranks, to less than 30 MB", full, () => {
  const bytes = [2048, 16_384].map((ranks) => planBytes(jobAt("deepseek-v3-1024gpu", deepseekSets(ranks))));
  expect(bytes[0]).toBeLessThan(30e6);
  expect(bytes[1]! / bytes[0]!).toBeLessThan(1.01);
});

test("a plan for 16,384 ranks is no longer than one for 16, but for the numbers themselves", () => {
  const layers = isFull ? 32 : 8;
  expect(planBytes(scaledJob({ ranks: 16_384, layers })) / planBytes(scaledJob({ ranks: 16, layers }))).toBeLessThan(1.05);
});

test("a plan grows no faster than its layers", full, () => {
  expect(planBytes(scaledJob({ layers: 64 })) / planBytes(scaledJob({ layers: 16 }))).toBeLessThan(4);
});
