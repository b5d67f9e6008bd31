/** Tensor lists of the optimizer step: which instructions they join, that no collective moves, and that no number changes. */
import { describe, expect, test } from "vitest";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Compute, Instruction, Program } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { membersOf } from "../../schemas/tensorLists.ts";
import { BufferTable } from "../../src/analysis/bufferTable.ts";
import { costOf } from "../../src/analysis/cost.ts";
import { layerOf } from "../../src/analysis/layerNames.ts";
import { cpu } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { joinTensors } from "../../src/passes/fusion/tensorLists.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { programChanges } from "../../src/report/programChanges.ts";
import { programLines } from "../../src/report/programText.ts";
import { fixture, jobOf } from "../support/job.ts";

const model = { layers: 2, hidden: 32, ffn: 48, heads: 4, kv_heads: 2, vocab: 256, seq: 16 };
const moe = { experts: 4, top_k: 2, ffn: 16, router: { balance: "none", score: "sigmoid", expert_bias: true, bias_rate: 0.01 } };
const jobWith = (parallel: object, train: object = {}, more: object = {}) =>
  jobOf({
    name: "lists",
    model: { ...model, ...more },
    parallel,
    train: {
      global_batch: 4,
      steps: 2,
      precision: "fp32",
      init: { std: 0.2 },
      ...train,
      optimizer: { lr: 1e-2, clip: 0, ...(train as { optimizer?: object }).optimizer },
    },
    data: { path: "corpus.txt" },
  });
const planOf = (job: ReturnType<typeof jobOf>, isJoined: boolean) =>
  parsePlan(printPlan(compile(job, { target: isJoined ? { ...cpu, fuses: ["tensor_lists"] } : cpu }).plan), "plan.json");
const lists = (step: readonly Instruction[]): Compute[] => step.flatMap((i) => (i.kind === "compute" && i.tensors ? [i] : []));

const zero = { world: 2, data: 2, distributed_optimizer: true };
const jobs = {
  "one rank": jobWith({ world: 1 }),
  "bf16 with scheduled decay": jobWith(
    { world: 1 },
    { precision: "bf16", optimizer: { weight_decay_schedule: "linear", weight_decay_start: 0.1, weight_decay_end: 0.2 } },
  ),
  "a mesh of experts": jobWith({ world: 4, tensor: 2, sequence: true, expert: 2, pipeline: 2 }, {}, { moe, tie_embeddings: true }),
  "shards, gathered in the step": jobWith(zero, { precision: "bf16" }),
  "shards in buckets": jobWith({ ...zero, gradient_bucket: 0.01, parameter_bucket: 0.01 }, { precision: "bf16" }),
  "shards, gathered in forward": jobWith({ ...zero, gradient_bucket: 0.01, parameter_bucket: 0.01, parameter_gather: "forward" }),
  "momentum, all norms": jobWith({ world: 2, tensor: 2 }, { optimizer: { type: "sgd", momentum: 0.9 }, metrics: { parameter_norm: true } }),
  muon: jobWith({ world: 2, data: 2 }, { optimizer: { type: "muon" } }),
};

async function train(plan: ReturnType<typeof planOf>) {
  const run = await openRun(plan, { baseDir: fixture("") });
  const steps = [await run.step({ detailed: true }), await run.step()];
  const gradients = await run.gradients();
  await run.close();
  return {
    losses: steps.map(({ loss }) => loss),
    norms: steps.flatMap(({ grad_norm, parameter_norm }) => (parameter_norm === undefined ? [grad_norm] : [grad_norm, parameter_norm])),
    gradients,
  };
}

/** The instructions of a step with each tensor of a list apart, between its collectives, in the order of what they write. */
function between({ step }: Pick<Program, "step">): string[][] {
  const parts: string[][] = [[]];
  for (const i of step) {
    if (i.kind !== "compute") parts.push([i.id], []);
    else for (const { op, reads, writes, only } of membersOf(i)) parts.at(-1)?.push(JSON.stringify([op, reads, writes, only]));
  }
  return parts.map((part) => part.sort());
}

describe.each(Object.entries(jobs))("%s", (_, job) => {
  const [plain, joined] = [planOf(job, false), planOf(job, true)];
  test("lists stand for the instructions between two collectives, which keep their places", () => {
    expect(joined.programs.flatMap(({ step }) => lists(step)).length).toBeGreaterThan(0);
    for (const [stage, program] of joined.programs.entries()) {
      expect(between(program)).toEqual(between(plain.programs[stage] ?? program));
      for (const list of lists(program.step)) {
        expect(membersOf(list)).toHaveLength(list.tensors ?? 0);
        // what waits begins no later than without lists: only the first of a run may wait
        expect(program.step.filter((i) => i.id === list.id)).toHaveLength(1);
      }
      const waits = (p: Program) => p.step.flatMap((i) => i.waits ?? []);
      expect(waits(program)).toEqual(waits(plain.programs[stage] ?? program));
    }
  });
  test("no stage needs more memory", () => {
    for (const [stage, { peak }] of joined.memory.entries()) expect(peak).toBeLessThanOrEqual(plain.memory[stage]?.peak ?? 0);
  });
  test("losses and gradients have the bits of single instructions, norms their value within f32", async () => {
    const [got, want] = [await train(joined), await train(plain)];
    expect(got.losses).toEqual(want.losses);
    expect(got.gradients).toEqual(want.gradients);
    for (const [n, norm] of want.norms.entries()) expect(Math.abs((got.norms[n] ?? 0) / norm - 1)).toBeLessThan(1e-6);
  });
});

test("sums with other factors alternate, and are two lists that add to one scalar", () => {
  const { step } = planOf(jobWith({ world: 2, tensor: 2 }), true).programs[0] ?? { step: [] };
  const sums = lists(step).filter(({ op }) => op === "sum_squares");
  expect(sums.map(({ attrs, tensors }) => [attrs.scale, tensors])).toMatchInlineSnapshot(`
    [
      [
        1,
        16,
      ],
      [
        0.5,
        5,
      ],
    ]
  `);
  expect(new Set(sums.map(({ writes }) => writes.y))).toEqual(new Set(["grad_norm.squared"]));
});

test("an instruction that reads what a list writes comes behind it; a buffer in the bytes of another counts as that one", () => {
  const buffer = (id: string, more: object = {}) => ({
    ...{ id, kind: "workspace" as const, dtype: "f32" as const, shape: [4], sizes: [4], ragged: 0, shardedBy: [[]] },
    ...more,
  });
  const cast = (x: string, y: string): Compute => ({
    ...{ kind: "compute", id: `${x}.${y}`, op: "cast", kernel: "", dims: {}, attrs: {} },
    reads: { x },
    writes: { y },
  });
  const join = (pairs: readonly (readonly [string, string])[], more: Readonly<Record<string, object>> = {}) => {
    const ids = [...new Set(pairs.flat())];
    const step = joinTensors(
      pairs.map(([x, y]) => cast(x, y)),
      { buffers: ids.map((id) => buffer(id, more[id])) },
    );
    return step.map((i) => (i.kind === "compute" ? membersOf(i).map(({ reads, writes }) => `${reads.x}${writes.y}`) : []));
  };
  expect(
    join([
      ["a", "b"],
      ["c", "d"],
    ]),
  ).toEqual([["ab", "cd"]]);
  expect(
    join([
      ["a", "b"],
      ["b", "c"],
      ["d", "e"],
    ]),
  ).toEqual([["ab"], ["bc", "de"]]);
  expect(
    join([
      ["a", "b"],
      ["c", "a"],
    ]),
  ).toEqual([["ab"], ["ca"]]);
  expect(
    join([
      ["a", "b"],
      ["c", "b"],
    ]),
  ).toEqual([["ab"], ["cb"]]);
  expect(
    join(
      [
        ["a", "b"],
        ["c", "d"],
      ],
      { c: { within: "b" } },
    ),
  ).toEqual([["ab"], ["cd"]]);
  // a part of a buffer may begin at no multiple of a vector
  expect(
    join(
      [
        ["a", "b"],
        ["c", "d"],
      ],
      { c: { part: { of: "x", at: 1 } } },
    ),
  ).toEqual([["ab"], ["cd"]]);
});

test("a list has as many tensors as the parameters of a kernel hold: longer runs are lists of about equal length", () => {
  const { step } = planOf(jobWith({ world: 1 }, {}, { layers: 40 }), true).programs[0] ?? { step: [] };
  expect(lists(step).map(({ op, tensors }) => [op, tensors])).toMatchInlineSnapshot(`
    [
      [
        "sum_squares",
        363,
      ],
      [
        "adamw",
        94,
      ],
      [
        "adamw",
        94,
      ],
      [
        "adamw",
        94,
      ],
      [
        "adamw",
        81,
      ],
    ]
  `);
});

test("a list is of no layer where its tensors are of several, and its line names the first tensor and how many more there are", () => {
  const [program] = planOf(jobs["one rank"], true).programs;
  if (!program) throw new Error("no program");
  const buffers = new Map(program.buffers.map((b) => [b.id, b]));
  const [sum] = lists(program.step);
  expect(sum && layerOf(sum, buffers)).toBe(undefined);
  expect(instructionsOf(program).filter((i) => layerOf(i, buffers) !== undefined).length).toBeGreaterThan(0);
  expect(
    programLines(program).flatMap(({ text }) => (text.includes("more tensor") ? [text.replace(/ +/g, " ")] : [])),
  ).toMatchInlineSnapshot(`
    [
      " tensors.sum_squares sum_squares g[256,32] -> y[] f32 and 20 more tensors keeps y",
      " tensors.adamw adamw g[256,32] scale[] lr[] step[] -> w[256,32] m[256,32] v[256,32] f32 and 15 more tensors keeps w m v",
      " tensors.adamw.1 adamw g[32] scale[] lr[] step[] -> w[32] m[32] v[32] f32 and 4 more tensors keeps w m v",
    ]
  `);
});

test("a list costs the bytes of its tensors, and scalars once", () => {
  const { programs, mesh } = planOf(jobs["one rank"], true);
  for (const program of programs) {
    const buffers = new BufferTable(program.buffers);
    for (const list of lists(program.step)) {
      const bytes = costOf(list, mesh, buffers).bytes;
      const each = membersOf(list).reduce((sum, one) => sum + costOf(one, mesh, buffers).bytes, 0);
      const scalars = list.op === "sum_squares" ? 2 : 3;
      expect(bytes).toBe(each - 4 * scalars * ((list.tensors ?? 0) - 1));
    }
  }
});

test("diff compares lists tensor by tensor: a layer more adds its tensors and changes no other", () => {
  const changes = (isJoined: boolean) => {
    const [two, three] = [2, 3].map((layers) => planOf(jobWith({ world: 1 }, {}, { layers }), isJoined).programs);
    return programChanges(two ?? [], three ?? []).filter(({ phase }) => phase === "step");
  };
  const facts = (isJoined: boolean) =>
    changes(isJoined)
      .map(({ change, does, layers }) => `${change} ${does} ${layers}`)
      .sort();
  expect(facts(true)).toEqual(facts(false));
  expect(changes(true).map(({ id }) => id)).toContain("layers.*.wq.adamw");
});
