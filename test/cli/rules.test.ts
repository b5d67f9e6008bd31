import fc from "fast-check";
import { expect, test } from "vitest";
import { stringify } from "yaml";
import { isDisjointSubAxes, shardCount } from "../../schemas/sharding.ts";
import { type Changes, renderFindings } from "../../src/frontend/diagnostic.ts";
import { badJob, codes, explain } from "../../src/frontend/explain.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { buildMesh, denseAxes, expertAxes } from "../../src/passes/mesh.ts";
import { rules } from "../../src/rules/all.ts";
import { smallest } from "../../src/rules/index.ts";
import { parallelOf } from "../support/job.ts";
import { draws, full } from "../support/tiers.ts";

const sets = (changes: Changes): string[] => Object.entries(changes).map(([path, value]) => `${path}=${JSON.stringify(value)}`);
const read = (text: string, set: readonly string[] = []) => readJob(text, "job.yaml", set);

test("the smallest job is valid, without a finding", () => {
  const { job, findings } = read(smallest);
  expect(findings).toEqual([]);
  expect(job?.parallel.data).toBe(1);
});

test("there are at least 30 rules with unique codes", () => {
  expect(rules.length).toBeGreaterThanOrEqual(30);
  expect(new Set(codes).size).toBe(codes.length);
});

test.each(rules.map((r) => [r.code, r] as const))("the bad example of %s violates that rule only", (code, rule) => {
  const { findings, job } = read(badJob(rule.bad));
  expect(findings.map((f) => f.code)).toEqual([code]);
  expect(job === undefined).toBe(rule.level === "error");
  const [finding] = findings;
  expect(finding?.at).toMatchObject({ file: "job.yaml" });
  expect(finding?.found).not.toMatch(/undefined|NaN|\[object/);
});

test.each(rules.map((r) => [r.code, r] as const))("%s names a fix that works", (code, rule) => {
  const [finding] = read(badJob(rule.bad)).findings;
  if (!finding?.set) return expect(["P112", "M312"]).toContain(code); // their way out is a choice, not a value
  const after = read(badJob(rule.bad), sets(finding.set));
  expect(after.findings.filter((f) => f.code === code || f.level === "error")).toEqual([]);
});

test("fixes still work when several things are wrong at once", () => {
  const text = stringify({
    name: "wrong",
    model: { layers: 5, hidden: 64, heads: 6, kv_heads: 4, head_dim: 16, vocab: 250, seq: 30, moe: { experts: 6, top_k: 7 } },
    parallel: { world: 16, tensor: 4, pipeline: 2, expert: 4 },
    train: { steps: 10, global_batch: 3, optimizer: { lr: 1e-3, betas: [1, 2] } },
    data: { path: "x" },
  });
  const first = read(text).findings;
  for (const f of first) {
    if (!f.set) continue;
    const after = read(text, sets(f.set)).findings;
    expect(after.some((g) => g.code === f.code && g.path === f.path)).toBe(false);
    const known = new Set(first.map((g) => `${g.code} ${g.path}`));
    expect(after.filter((g) => !known.has(`${g.code} ${g.path}`))).toEqual([]);
  }
  // all fixes of one report apply together
  const together = read(text, sets(Object.assign({}, ...first.flatMap((f) => f.set ?? []))));
  const left = new Set(together.findings.map((f) => `${f.code} ${f.path}`));
  for (const f of first) if (f.set) expect(left.has(`${f.code} ${f.path}`)).toBe(false);
  expect(first.map((f) => f.code)).toEqual(expect.arrayContaining(["P104", "P107", "M301", "M308", "E401", "E402", "B207"]));
});

test("a fix does not bring back what an earlier fix of the report removes", () => {
  const text = stringify({
    name: "wrong",
    model: { layers: 2, hidden: 64, heads: 4, vocab: 256, seq: 64, moe: { experts: 4, top_k: 2, router: { aux_coeff: 0.01 } } },
    parallel: { world: 4, tensor: 3, sequence: true, expert: 3 },
    train: { steps: 10, global_batch: 4, optimizer: { lr: 1e-3 } },
    data: { path: "x" },
  });
  const fixed = read(text).findings.filter(({ set }) => set);
  expect(fixed.map(({ code }) => code)).toEqual(expect.arrayContaining(["P101", "P111", "E402"]));
  const together = read(text, sets(Object.assign({}, ...fixed.map(({ set }) => set)))).findings;
  expect(together.filter(({ code, path }) => fixed.some((f) => f.code === code && f.path === path))).toEqual([]);
});

const moe = { experts: 8, top_k: 2, router: { aux_coeff: 0.01 } };
test.each([
  [
    "mlp recomputed where every layer has experts",
    { model: { moe }, recompute: { mode: "selective", modules: ["core_attn", "mlp"] } },
    "B230",
  ],
  ["group_top_k without groups", { model: { moe: { ...moe, router: { ...moe.router, group_top_k: 2 } } } }, "E442"],
  ["group_scores without groups", { model: { moe: { ...moe, router: { ...moe.router, group_scores: 1 } } } }, "E442"],
])("%s is a warning: the key changes no number", (_, { model, recompute }: { model: object; recompute?: object }, code) => {
  const { job, findings } = read(
    stringify({
      name: "unread",
      model: { layers: 2, hidden: 16, heads: 2, vocab: 256, seq: 16, ...model },
      train: { steps: 1, optimizer: { lr: 1e-3 }, ...(recompute && { recompute }) },
      data: { path: "corpus.txt" },
    }),
  );
  expect(job).toBeDefined();
  expect(findings.map(({ code, level }) => [code, level])).toEqual([[code, "warning"]]);
});

test("every code can be explained", () => {
  for (const code of codes) expect(explain(code)?.finding.code).toBe(code);
  expect(explain("P999")).toBeUndefined();
});

test("a finding shows the conflicting keys, the values, the reason and the fix", () => {
  const { findings } = read(`name: mixtral
model: {layers: 2, hidden: 64, heads: 4, vocab: 256, seq: 64, moe: {experts: 8, top_k: 2, router: {aux_coeff: 0.01}}}
parallel:
  world: 8
  tensor: 2
  expert: 4
train: {steps: 10, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`);
  expect(renderFindings(findings, { color: false })).toMatchInlineSnapshot(`
    "error[P104]: expert and tensor parallelism need sequence parallelism
     --> job.yaml:3:1
      |
    3 | parallel:
      | ^^^^^^^^  parallel.sequence is not written: false
     ::: job.yaml:6:11
      |
    6 |   expert: 4
      |           -  parallel.expert
     ::: job.yaml:5:11
      |
    5 |   tensor: 2
      |           -  parallel.tensor
      = found: tensor 2 and expert 4 with sequence: false
      = why:   Without sequence parallelism every tensor rank holds the same tokens and sends the same
               rows, so that traffic and expert work are redundant. Megatron-LM warns when it reads the
               arguments and stops in the first forward pass, on the cluster (Megatron-LM #1587, NeMo-RL
               #1075).
      = fix:   parallel.sequence: true (shard the sequence over the tensor ranks, or use tensor 1)

    1 error
    "
  `);
});

test("a job moved from Megatron's configurations that fail late is refused before anything runs", full, () => {
  const moe = { experts: 8, top_k: 2, router: { aux_coeff: 0.01 } };
  const job = (over: { model?: object; parallel?: object }) =>
    stringify({
      name: "gap",
      model: { layers: 32, hidden: 4096, ffn: 14336, heads: 32, kv_heads: 8, vocab: 32000, seq: 2048, ...over.model },
      parallel: { world: 16, tensor: 4, sequence: true, expert: 4, ...over.parallel },
      train: { steps: 10, global_batch: 128, optimizer: { lr: 1e-4 } },
      data: { path: "corpus.txt" },
    });
  const errors = (over: { model?: object; parallel?: object }) =>
    read(job(over)).findings.flatMap((f) => (f.level === "error" ? [f.code] : []));
  expect(errors({ model: { moe } })).toEqual([]);
  expect(errors({ model: { moe }, parallel: { sequence: false } })).toEqual(["P104"]);
  expect(errors({ model: { moe }, parallel: { expert: 8, expert_tensor: 4 } })).toEqual(["P102"]);
  expect(errors({ model: { moe: { ...moe, top_k: 9 } } })).toEqual(["E401"]);
  expect(errors({ model: { moe: { ...moe, ffn: 14337 } }, parallel: { expert_tensor: 2 } })).toEqual(["E403"]);
  expect(errors({ model: { moe, seq: 2046 } })).toEqual(["P111"]);
  expect(errors({ model: { ffn: 14338 }, parallel: { expert: 1 } })).toEqual(["M305"]);
});

const cluster = { nodes: 1, gpus_per_node: 8, device: "cpu" } as const;

/** Whether the mesh can be built, each grid of factors that tell all ranks apart, and every axis is the product of its own. */
function isBuilt(job: Parameters<typeof buildMesh>[0]): boolean {
  try {
    const mesh = buildMesh(job);
    const { axes, subAxes, sizes, per_stage } = mesh;
    for (const grid of [denseAxes, expertAxes]) {
      const own = grid.flatMap((axis) => axes[axis]);
      if (!isDisjointSubAxes(mesh, own) || shardCount(mesh, own) !== per_stage) return false;
    }
    return ([...denseAxes, ...expertAxes, "kv", "copies"] as const).every(
      (axis) => axes[axis].reduce((n, f) => n * subAxes[f]!.size, 1) === sizes[axis],
    );
  } catch {
    return false;
  }
}

test("a grid can be built if and only if the rules accept it", () => {
  const degree = fc.constantFrom(1, 2, 3, 4, 6, 8);
  const grids = fc.record({
    tensor: degree,
    pipeline: fc.constantFrom(1, 2, 4),
    context: degree,
    data: degree,
    expert: degree,
    expert_tensor: degree,
  });
  fc.assert(
    fc.property(grids, (degrees) => {
      const world = degrees.tensor * degrees.pipeline * degrees.context * degrees.data;
      const model = {
        ...{ layers: 4, hidden: 48, ffn: 48, heads: 24, kv_heads: 24, head_dim: 2, vocab: 768, seq: 2304 },
        moe: { experts: 24, top_k: 2, router: { aux_coeff: 0.01 } },
      };
      const { findings } = read(
        stringify({
          name: "grid",
          model,
          parallel: { world, sequence: true, ...degrees },
          train: { steps: 1, optimizer: { lr: 1 } },
          data: { path: "x" },
        }),
      );
      const errors = findings.flatMap((f) => (f.level === "error" ? [f] : []));
      expect(errors.every((f) => f.code === "P102" && f.set)).toBe(true);
      expect(isBuilt({ model: { kv_heads: degrees.tensor }, parallel: parallelOf({ world, sequence: true, ...degrees }), cluster })).toBe(
        errors.length === 0,
      );
    }),
    { numRuns: draws(40, 150) },
  );
});

test("a warning that the job allows is not reported; an error is", () => {
  const crossing = "model: {moe: {experts: 16, top_k: 2, router: {aux_coeff: 0.01}}}\nparallel: {world: 16, expert: 16}\n";
  expect(read(badJob(crossing)).findings.map((f) => f.code)).toEqual(["C504"]);
  const allowed = read(badJob(`${crossing}allow: [C504]\n`));
  expect([allowed.findings, allowed.job && "allow" in allowed.job]).toEqual([[], false]);
  expect(read(badJob("parallel: {world: 3, pipeline: 3}\ntrain: {global_batch: 12}\nallow: [P107]\n")).findings[0]?.code).toBe("P107");
  expect(read(badJob("allow: [expert groups]")).findings[0]?.code).toMatch(/^S01/);
});

test("C504 proposes no change that C510 would undo: only a job that certainly fits", () => {
  const large = "model: {layers: 32, hidden: 8192, ffn: 8192, heads: 64, moe: {experts: 64, top_k: 2, router: {aux_coeff: 0.01}}}\n";
  const finding = read(badJob(`${large}parallel: {world: 16, expert: 16}\ncluster: {device: h100-80gb}\n`)).findings.find(
    (f) => f.code === "C504",
  );
  expect(finding?.set).toBeUndefined();
  expect(finding?.fix).toContain("allow: [C504]");
});

test("explain shows the example with its fix applied, which has no finding", full, () => {
  for (const { code, bad } of rules) {
    const { corrected } = explain(code)!;
    if (corrected === undefined) continue;
    expect(corrected).not.toBe(bad);
    expect(read(badJob(corrected)).findings.filter((f) => f.code === code)).toEqual([]);
  }
});

test("findings are sorted by line, and a second place has its key as label", () => {
  const text = renderFindings(
    read(badJob("model: {layers: 5, vocab: 100}\nparallel: {world: 2, pipeline: 2}\ntrain: {global_batch: 4}")).findings,
    { color: false },
  );
  const lines = [...text.matchAll(/--> job\.yaml:(\d+)/g)].map((m) => Number(m[1]));
  expect(lines).toEqual(lines.toSorted((a, b) => a - b));
  expect(lines.length).toBeGreaterThan(1);
  expect(text).toContain("-  model.layers");
});

const idle = "parallel: {world: 2, pipeline: 2}\ntrain: {global_batch: 1}";
test("allow silences a warning that it gives a reason for, and nothing else", () => {
  const reported = (more: string) => read(badJob(`${idle}\n${more}`)).findings.map(({ code }) => code);
  expect(reported("")).toEqual(["P108"]);
  expect(reported("allow: [{code: P108, reason: one microbatch fits}]")).toEqual([]);
  expect(reported("allow: [{code: C504, reason: none}]")).toEqual(["P108"]);
  expect(read(badJob("model: {kv_heads: 3}\nallow: [{code: M301, reason: x}]")).findings.map(({ code }) => code)).toEqual(["M301", "S016"]);
  const [finding] = read(badJob("allow: [{code: P999, reason: x}]")).findings;
  expect(finding).toMatchObject({ code: "S016", level: "error", path: "allow.0.code", found: "no rule has the code P999" });
  expect(finding?.at).toMatchObject({ file: "job.yaml" });
  expect(reported("allow: [{code: P108}]")).toContain("S011");
});

test("a plan does not depend on `allow`", () => {
  const { job } = read(badJob(`${idle}\nallow: [{code: P108, reason: one microbatch fits}]`));
  expect(job).toEqual(read(badJob(idle)).job);
});
