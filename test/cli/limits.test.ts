/** Sizes and numbers at the limits of a job: what `check` accepts compiles, and what it refuses names the limit. */
import { expect, test } from "vitest";
import { LARGEST } from "../../schemas/float32.ts";
import { jobSchema } from "../../schemas/jobSchema.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { rmsnorm } from "../../src/ops/norm.ts";
import type { Leaf, Value } from "../../src/ops/op.ts";
import { mean, nll, rowMax, softmaxTerms } from "../../src/ops/vocab.ts";
import { addBackward } from "../../src/passes/backward.ts";

test.each([
  ["kept", false],
  ["computed again", true],
])("a graph of 10,000 nodes in a row has a backward, outputs %s", (_, again) => {
  const leaf = (kind: Leaf["kind"], name: string, sizes: readonly number[]): Value => ({
    ...{ out: 0, sizes, ragged: 0, fanout: 0, dtype: "f32", shardAxes: sizes.map(() => []) },
    leaf: { kind, name, position: 0 },
  });
  const gain = leaf("parameter", "gain", [4]);
  let x = leaf("input", "x", [1, 1, 4]);
  for (let i = 0; i < 10_000; i++) x = rmsnorm.of({ x, gain }, { eps: 1e-5 }, `norm${i}`);
  const m = rowMax.of({ x }, {}, "largest");
  const target: Value = { ...leaf("input", "target", [1, 1]), dtype: "i32" };
  const l = nll.of({ m, ...softmaxTerms.all({ x, m, target }, {}, "terms") }, {}, "token");
  const value = mean.of({ l }, { count: 1 }, "loss");
  const { order, parameterGrads } = addBackward(
    { losses: [{ name: "loss", value }], updateInputs: new Map() },
    { isRecomputed: ({ op }) => again && op === rmsnorm },
  );
  expect(parameterGrads.get(gain)!.length).toBe(10_000);
  expect(order.length).toBeGreaterThan(20_000);
});

interface Schema {
  readonly type?: string;
  readonly maximum?: number;
  readonly anyOf?: readonly Schema[];
  readonly properties?: Readonly<Record<string, Schema>>;
}
/** All keys of a job whose value may be a number that is not whole, and which have no lower limit of their own. */
const reals = (schema: Schema, path: string): string[] =>
  (schema.anyOf ?? [schema]).flatMap((s) =>
    s.type === "number"
      ? (s.maximum ?? LARGEST) < 1e30
        ? []
        : [path]
      : Object.entries(s.properties ?? {}).flatMap(([key, of]) => reals(of, path ? `${path}.${key}` : key)),
  );
const numbers = [...new Set(reals(jobSchema() as Schema, ""))];

/** A job with every section, so that each of these keys is read by something. */
const whole = `name: whole
model:
  {layers: 1, hidden: 16, ffn: 16, heads: 2, head_dim: 8, vocab: 256, seq: 16, rope: {scaling: {type: yarn, factor: 2}}, mtp: {layers: 1},
   moe: {experts: 4, top_k: 2, ffn: 8, router: {aux_coeff: 0.01}}}
train: {steps: 100, precision: fp32, optimizer: {lr: 1.0e-3, schedule: cosine}}
data: {path: corpus.txt}
`;
const withKey = (key: string, value: string) => readJob(whole, "job.yaml", [`${key}=${value}`]);

test("there are keys to try", () => expect(numbers.length).toBeGreaterThan(30));

test.each(numbers)("%s: a number that float32 cannot hold is refused with the limit; the largest one compiles if it is accepted", (key) => {
  const tooLarge = withKey(key, "1.0e+39").findings.filter(({ path }) => key.startsWith(path.replace(/\.\w+$/, "")));
  expect(tooLarge.map(({ code }) => code)).toContain("S015");
  expect(tooLarge.find(({ code }) => code === "S015")!.fix).toMatch(/at most (3\.403e\+38|1e\+30)/);
  for (const value of [`${LARGEST}`, "1.0e+30"]) {
    const { job } = withKey(key, value);
    if (!job) continue;
    for (const i of compile(job).plan.programs.flatMap(instructionsOf))
      if (i.kind === "compute")
        for (const n of Object.values(i.attrs)) expect(Math.abs(Math.fround(n)), `${i.id} of ${key} ${value}`).toBeLessThan(Infinity);
  }
});

test.each([
  ["train.optimizer.lr", "B202"],
  ["train.optimizer.eps", "B208"],
  ["train.optimizer.clip", "B210"],
  ["train.init.std", "B211"],
  ["model.norm.eps", "M310"],
  ["model.moe.router.scaling", "E422"],
])("%s: a positive number that is 0 as a float32 is refused", (key, code) => {
  expect(withKey(key, "1.0e-50").findings.map((f) => f.code)).toContain(code);
});

test.each([
  ["train.optimizer.betas", "[0.9, 0.99999999]", "B207"],
  ["model.dropout.hidden", "0.99999999", "M350"],
])("%s: a share that is 1 as a float32 is refused as 1 is", (key, value, code) => {
  expect(withKey(key, value).findings.map((f) => f.code)).toContain(code);
});

test.each([
  ["model.layers", "4097", /from 1 to 4096/],
  ["parallel.context", "257", /from 1 to 256/],
  ["data.path", '"corpus\\0.txt"', /name the training text/],
  ["data.labels", '"labels\\0.i32"', /name the file of labels/],
  ["model.mtp.layers", "65", /from 1 to 64/],
  ["model.moe.layers", `[${Array(5000).fill(1)}]`, /a list of at most 4096/],
  ["train.recompute.modules", `[${Array(9).fill("mlp")}]`, /a list of at most 8/],
])("%s has a limit, and the finding names it", (key, value, limit) => {
  const { job, findings } = withKey(key, value);
  expect(job).toBeUndefined();
  expect(findings.map((f) => `${f.path}: ${f.fix}`).join("\n")).toMatch(limit);
});
