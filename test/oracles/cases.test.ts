/** Jobs that once failed, with the numbers, the finding or the error that each must have: fixtures/cases, and changes to its base job. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { IGNORED } from "../../runtime/data/tokens.ts";
import type { StepResult } from "../../runtime/train/loop.ts";
import { openRun, type RunSettings } from "../../runtime/train/openRun.ts";
import { trainingSchedule } from "../../runtime/train/stepParameters.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { compile } from "../../src/compile.ts";
import { parseConfig } from "../../src/convert/hf/configReader.ts";
import { importHf } from "../../src/convert/hf/importHf.ts";
import { renderFindings } from "../../src/frontend/diagnostic.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { peakOf } from "../../src/rules/all.ts";
import { fixture } from "../support/job.ts";
import { labelsBeside, littleEndian } from "../support/labels.ts";
import { megatronIndex } from "../support/megatronIndex.ts";
import { jobAt } from "../support/scale.ts";
import { byTier, full, once } from "../support/tiers.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-cases-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const textOf = (name: string): string => readFileSync(fixture(`cases/${name}.yaml`), "utf8");
const base = textOf("base-moe");
/** Step 1 of the base job on any mesh. */
const baseNumbers = { loss: 6.24434, aux_loss: 0.650381, grad_norm: 3.465614 };

function jobFrom(text: string, sets: readonly string[] = []) {
  const { job, findings } = readJob(text, "job.yaml", sets);
  if (!job) throw new Error(renderFindings(findings, { color: false }));
  return job;
}

/** The first `count` steps of a job on the CPU; with `save`, a checkpoint follows them. */
async function stepsOf(text: string, sets: readonly string[], count = 1, settings: Partial<RunSettings> = {}): Promise<StepResult[]> {
  const run = await openRun(compile(jobFrom(text, sets)).plan, { baseDir: fixture(""), ...settings });
  try {
    const steps: StepResult[] = [];
    while (steps.length < count) steps.push(await run.step());
    if (settings.save) await run.save();
    return steps;
  } finally {
    await run.close();
  }
}

/** The user error with which a run of the job ends. */
async function troubleOf(...run: Parameters<typeof stepsOf>): Promise<Trouble> {
  const error = await stepsOf(...run).catch((thrown: unknown) => thrown);
  expect(error).toBeInstanceOf(Trouble);
  return error as Trouble;
}

function expectNumbers(got: StepResult, want: Pick<StepResult, "loss" | "aux_loss" | "grad_norm">): void {
  for (const name of ["loss", "aux_loss", "grad_norm"] as const)
    expect(Math.abs(got[name] - want[name]), `${name} ${got[name]}, not ${want[name]}`).toBeLessThan(2e-5 * Math.max(1, want[name]));
}

const layout = (pipeline: number, text: string): string[] => [
  `parallel.world=${pipeline}`,
  `parallel.pipeline=${pipeline}`,
  `parallel.layout=${text}`,
];
const layouts: readonly (readonly [string, readonly string[]])[] = [
  ["base", []],
  ["layout-empty-stage", layout(4, "Ett||tt|L")],
  ["layout-self-send", layout(2, "E||tttt|L")],
  ["layout-wait", layout(2, "Etttt|||L")],
  ["layout-comma", layout(2, "Et,t|tt,L")],
];
for (const { options, rows } of byTier(layouts, ([name]) => !/self-send|comma/.test(name)))
  test.each(rows)("%s: the numbers of base", options, async (_, sets) => {
    expectNumbers((await stepsOf(base, sets))[0]!, baseNumbers);
  });

const oneRank = "parallel={world: 1}";
test.each(["F1-interleaved-odd-microbatches", "F2-layout-chunks-on-one-stage", "F3-empty-stage", "F4-empty-chunk-deadlock"])(
  "%s: the numbers of one rank",
  async (name) => {
    const text = textOf(`robust/${name}`);
    expectNumbers((await stepsOf(text, []))[0]!, (await stepsOf(text, [oneRank]))[0]!);
  },
);

test.each([
  ["robust/F5-layout-repeat", [["P113", /longer than 1,000,000 letters/]]],
  ["robust/F7-aux-coeff-1e308", [["S015", /at most 3\.403e\+38/]]],
  [
    "robust/F8-check-hangs-pipeline-65537",
    [
      ["P101", /world 4 is not a multiple/],
      ["P107", /4 layers over 65537 stages/],
    ],
  ],
] as const)("%s: a finding names the limit", (name, expected) => {
  const { job, findings } = readJob(textOf(name), `${name}.yaml`);
  expect(job).toBeUndefined();
  expect(findings.map((f) => f.code)).toEqual(expected.map(([code]) => code));
  for (const [i, [, limit]] of expected.entries()) expect(`${findings[i]!.found} ${findings[i]!.fix}`).toMatch(limit);
});

test("robust/avalanche: fifty findings and a count of the others", () => {
  const { job, findings } = readJob(textOf("robust/avalanche"), "avalanche.yaml");
  expect(job).toBeUndefined();
  const text = renderFindings(findings, { color: false });
  expect(text.match(/^error/gm)).toHaveLength(50);
  expect(text).toMatch(/… and \d+ more: \d+ x S001/);
});

test("robust/F6-2000-layers: compiles", full, () => {
  expect(compile(jobFrom(textOf("robust/F6-2000-layers"))).plan.programs[0]!.chunks[0]!.layers).toEqual([0, 2000]);
});

for (const { options, rows } of byTier(["fp32", "bf16"], (precision) => precision === "bf16"))
  test.each(rows)("nan, %s: the run ends at step 2, which changes nothing", options, async (precision) => {
    const sets = ["train.optimizer.lr=1.0e+30", `train.precision=${precision}`];
    expect(await troubleOf(base, sets, 2)).toMatchObject({ exit: 2, message: expect.stringMatching(/^step 2: the loss is NaN; /) });
  });

test("fp16-hopeless: the run ends with the reason", async () => {
  const trouble = await troubleOf(base, ["train.precision=fp16", "train.loss_scale=1", "train.init.std=200"], 8);
  expect(trouble).toMatchObject({ exit: 2, message: expect.stringMatching(/^step \d: the loss is NaN; /) });
});

describe("resume", () => {
  const parts = ["model.moe.shared.ffn=64", "model.qkv_bias=true", "model.qk_norm=head"];
  const train = ["train.steps=20", "train.optimizer.lr=0.01"];
  const save = join(folder, "snapshots");
  const saved = once(() => stepsOf(base, [...parts, ...train], 10, { save }));
  const from = async (): Promise<Partial<RunSettings>> => {
    await saved();
    return { resume: save };
  };

  test("resume-other-model, unchanged: step 11 continues the run", async () => {
    expect((await stepsOf(base, [...parts, ...train], 1, await from()))[0]!.loss).toBeCloseTo(3.17185, 4);
  });

  test.each([
    ["tie_embeddings true", [...parts, "model.tie_embeddings=true"], ["model.tie_embeddings is false in the checkpoint, true in the job"]],
    ["layers 1", [...parts, "model.layers=1"], ["model.layers is 4 in the checkpoint, 1 in the job"]],
    ["none of the three", [], ["model.qkv_bias is true", 'model.qk_norm is "head"', 'model.moe.shared is {"ffn":64,"gate":false}']],
  ])("resume-other-model, %s: refused with the differences", async (_, sets, differences) => {
    const { message, fix } = await troubleOf(base, [...sets, ...train], 1, await from());
    for (const difference of differences) expect(message).toContain(difference);
    expect(fix).toContain("--allow-mismatch model.");
  });

  test("resume-fp16: the scale begins at `initial`, patience is the hysteresis", async () => {
    const scale = ["train.precision=fp16", "train.loss_scale={initial: 256, min: 128, hysteresis: 3}"];
    expect((await stepsOf(base, [...parts, ...train, ...scale], 1, await from()))[0]!.loss_scale).toBe(256);
    const before = { steps: 10, read: 80, trained: 80, updates: 10, loss_scale: null };
    const { loss_scale } = trainingSchedule(jobFrom(base, [...train, ...scale]), before).progress();
    expect(loss_scale).toEqual({ scale: 256, well: 0, patience: 3 });
  });
});

test.each([
  { share: "all", inTen: 10 },
  { share: "10 %", inTen: 1 },
  { share: "none", inTen: 0 },
])(
  "token-weighting, $share of the tokens labelled: the auxiliary loss is 0.35102 x tokens / labels, and a warning says so",
  async ({ inTen }) => {
    const labels = labelsBeside(fixture("corpus.txt"), (ids) => Int32Array.from(ids, (id, i) => (i % 10 < inTen ? id : IGNORED)));
    const sets = ["model.layers=2", "data.order=sequential", "train.loss_weighting=token", `data.labels=${labels.path}`];
    try {
      expect(readJob(base, "job.yaml", sets).findings.map(({ title }) => title)).toContain(
        "loss_weighting: token multiplies balancing losses by tokens / labels",
      );
      const [step] = await stepsOf(base, sets);
      if (inTen === 0) expect(step).toMatchObject({ loss: 0, aux_loss: 0, grad_norm: 0, labels: 0 });
      else expect((step!.aux_loss * step!.labels!) / step!.tokens).toBeCloseTo(0.35102, 4);
    } finally {
      labels.remove();
    }
  },
);

test("int32-bin: the index states the type of ids", async () => {
  const corpus = readFileSync(fixture("corpus.txt"));
  writeFileSync(join(folder, "set.bin"), littleEndian(corpus, "i32"));
  writeFileSync(join(folder, "set.idx"), megatronIndex(4, 4, [corpus.length]));
  const sets = [`data.path=${join(folder, "set.bin")}`];
  expectNumbers((await stepsOf(base, sets))[0]!, baseNumbers);
});

describe("imported configs", () => {
  const imported = (name: string) => importHf(parseConfig(readFileSync(fixture(`hf-configs/${name}.json`), "utf8"), name), name);
  test("import-v2: the balancing loss is seq_aux_loss, 0.001", () => {
    const { job } = imported("deepseek-ai--DeepSeek-V2-Lite");
    expect(job.model.moe?.router).toMatchObject({ balance: "seq_aux_loss", aux_coeff: 0.001 });
  });
  test("import-v3-memory: 18 bytes x 671,026,419,200 parameters", () => {
    expect(imported("deepseek-ai--DeepSeek-V3").notes.join("\n")).toContain("take about 12,078 GB");
  });
});

test("mixtral-script: the seed's script takes 63.8 GiB", () => {
  const job = jobAt("mixtral-8x7b-16gpu", {});
  expect(job).toMatchObject({
    parallel: { expert_tensor: 4 },
    model: { rope: { theta: 10_000 }, vocab: 32_256 },
    train: { optimizer: { betas: [0.9, 0.999] } },
  });
  expect((peakOf(job).bytes / 2 ** 30).toFixed(1)).toBe("63.8");
});
