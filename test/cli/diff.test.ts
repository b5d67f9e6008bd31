import { expect, test } from "vitest";
import type { Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { memoryKinds, memoryNames, peakOfParts } from "../../src/analysis/memoryBreakdown.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { diffPlans } from "../../src/report/diff.ts";
import { printDiff } from "../../src/report/diffText.ts";
import { findId } from "../../src/report/findId.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { inspectRank } from "../../src/report/inspectRank.ts";
import { printInspect } from "../../src/report/inspectText.ts";
import { drawPlan } from "../../src/report/planPicture.ts";
import { printPlanText } from "../../src/report/planText.ts";
import { drawSchedule } from "../../src/report/schedulePicture.ts";
import { explainId } from "../../src/report/why.ts";
import { blockRuns } from "../support/blockRuns.ts";

const text = `
name: small
model: {layers: 4, hidden: 32, ffn: 48, heads: 4, kv_heads: 2, vocab: 256, seq: 16, moe: {experts: 4, top_k: 2, router: {aux_coeff: 0.01}}}
parallel: {world: 8, tensor: 2, sequence: true, pipeline: 2, expert: 2, distributed_optimizer: true}
train: {global_batch: 8, steps: 10, precision: fp32, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`;

function planOf(...sets: string[]): Plan {
  const { job, findings } = readJob(text, "job.yaml", sets);
  if (!job) throw new Error(findings.map((f) => f.found).join("; "));
  return compile(job).plan;
}
const plan = planOf();

test("a plan does not differ from itself, compiled again or read back", () => {
  const again = planOf();
  expect(printPlan(again)).toBe(printPlan(plan));
  expect(diffPlans(plan, parsePlan(printPlan(again), "plan.json"))).toMatchObject({
    changes: false,
    sections: [],
    job: [],
    summary: [],
    program: [],
  });
  expect(printDiff(diffPlans(plan, again))).toBe("the plans are the same\n");
});

test("inspect and diff print the same for a compiled plan and for a plan read from a file", () => {
  expect(printPlanText(parsePlan(printPlan(plan), "plan.json"))).toBe(printPlanText(plan));
});

test("a change of the learning rate changes the job and no program", () => {
  const diff = diffPlans(plan, planOf("train.optimizer.lr=2.0e-3"));
  expect(diff.job).toEqual([{ path: "train.optimizer.lr", old: 0.001, new: 0.002 }]);
  expect(diff.summary).toEqual([]);
});

test("a change that repeats over layers and stages is printed once", () => {
  const { program, summary } = diffPlans(plan, planOf("train.precision=bf16"));
  const router = program.filter((change) => change.id === "layers.*.moe.w1");
  expect(router).toHaveLength(1);
  expect(router[0]).toMatchObject({ change: "changed", phase: "forward", stages: [0, 1] });
  expect([...router[0]!.layers].sort()).toEqual([0, 1, 2, 3]);
  expect(router[0]!.differences).toContainEqual({ what: "y dtype", old: "f32", new: "bf16" });
  expect(summary.find((change) => change.what === "memory parameter" && change.stages.includes(0))?.new).toBeLessThan(
    inspectPlan(plan).roles[0]!.memory.parameter,
  );
});

test("a change of what instructions wait for is printed once for all layers", () => {
  const shared = "model.moe.shared={ffn: 16}";
  const { program } = diffPlans(planOf(shared), planOf(shared, "parallel.expert_overlap=shared"));
  const waits = program.flatMap(({ differences }) => differences.filter(({ what, new: now }) => what === "waits for" && now !== ""));
  expect(waits.length).toBeGreaterThan(2);
  expect(waits.filter((w) => /layers\.\d/.test(JSON.stringify(w)))).toEqual([]);
});

test("pairs of microbatches stand in diff, the picture of the schedule, the order of a rank, plan.txt and the answers to why", () => {
  const paired = planOf("parallel.expert_overlap=interleave", "train.global_batch=16");
  const other = planOf("train.global_batch=16");
  const { job, summary } = diffPlans(other, paired);
  expect(job).toEqual([{ path: "parallel.expert_overlap", old: "none", new: "interleave" }]);
  const change = (what: string) => summary.filter((c) => c.what === what).map((c) => [c.stages, c.old, c.new]);
  expect(change("pairs of forward and backward")).toEqual([
    [[0], 0, 5],
    [[1], 0, 7],
  ]);
  expect(change("copies")).toEqual([
    [[0], 2, 4],
    [[1], 1, 2],
  ]);
  expect(summary.some((c) => c.what === "memory peak" && c.new > c.old)).toBe(true);
  const { rows, legend } = inspectPlan(paired).schedule;
  expect(rows[1]).toContain("F1+ B0");
  expect(legend).toContain("+ alternates with the next");
  expect(inspectRank(paired, 7).order.slice(0, 4)).toEqual(["F0", "F1+B0", "F2+B1", "F3+B2"]);
  expect(printPlanText(paired)).toMatch(/pair: forward and backward of an earlier microbatch, \d+ turns of instructions: /);
  expect(drawPlan(paired)).toContain("microbatch 3: forward, units");
  expect(drawPlan(paired)).toContain("alternates with the backward after it");
  const dispatch = instructionsOf(paired.programs[1]!).find((i) => i.kind === "collective" && i.name === "dispatch")!;
  expect(explainId(paired, findId(paired, dispatch.id)).because.join("; ")).toMatch(
    /it runs beside the backward of an earlier microbatch in [57] of 8 block runs of a step \(parallel\.expert_overlap\)/,
  );
  const alone = planOf("parallel.expert_overlap=interleave", "parallel.pipeline=1");
  const kept = alone.programs[0]!.buffers.find(({ kind }) => kind === "activation")!;
  expect(explainId(alone, findId(alone, kept.id))).toMatchObject(
    instructionsOf(alone.programs[0]!).some(({ id }) => id === kept.id)
      ? {}
      : { key: { path: "parallel.expert_overlap" }, times_per_step: 2 },
  );
});

test("swapping the plans swaps added and removed, old and new", () => {
  const other = planOf("parallel.expert=1");
  const [there, back] = [diffPlans(plan, other), diffPlans(other, plan)];
  const names = (diff: typeof there, change: string) =>
    diff.program
      .filter((c) => c.change === change)
      .map((c) => `${c.phase} ${c.id} ${c.layers.length}`)
      .sort();
  expect(names(there, "added")).toEqual(names(back, "removed"));
  expect(names(there, "removed")).toEqual(names(back, "added"));
  expect(names(there, "removed").join("\n")).toContain("dispatch");
  expect(there.summary.map((c) => [c.what, c.old, c.new])).toEqual(expect.arrayContaining(back.summary.map((c) => [c.what, c.new, c.old])));
});

test("with another number of stages a layer moves to another stage; it is not removed and added", () => {
  const { program } = diffPlans(plan, planOf("parallel.pipeline=1", "parallel.data=4"));
  const moved = program.find(
    (c) => c.phase === "forward" && c.id === "layers.*.attn.core" && c.differences.some((d) => d.what === "stage"),
  );
  expect(moved).toMatchObject({ change: "changed", differences: [{ what: "stage", old: "1", new: "0" }] });
});

test("inspect counts each collective with its origin, and the parts are the whole", () => {
  const view = inspectPlan(plan);
  for (const [stage, role] of view.roles.entries()) {
    const moves = instructionsOf(plan.programs[stage]!).filter((i) => i.kind === "collective");
    expect(role.collectives.reduce((sum, c) => sum + c.count, 0)).toBe(moves.length);
    expect(role.collectives.every((c) => c.path !== "" && c.ops.length > 0)).toBe(true);
    expect(peakOfParts(role.memory)).toBe(role.memory.peak);
  }
  expect(view.derived).toMatchObject({ data: 2, edp: 2, local_experts: 2, microbatches: 4 });
  expect(printInspect(view)).toContain("layers.*.moe.w1.x: layers.*.w1 is sharded along E (parallel.expert)");
});

test.each(["cpu", "webgpu:baseline", "cuda:sm_90a"])(
  "the parts of memory, scratch of kernels among them, add up to the peak on %s",
  async (name) => {
    const { plan: made } = compile(readJob(text, "job.yaml").job!, { target: await loadTarget(name) });
    const view = inspectPlan(made);
    for (const { memory, stage } of view.roles) {
      expect(peakOfParts(memory)).toBe(memory.peak);
      expect(memory.peak).toBe(made.memory[stage]!.peak);
      expect(memory.scratch > 0).toBe(name !== "cpu");
    }
    for (const printed of [printInspect(view), printPlanText(made)])
      expect(/workspace +(scratch +)?peak/.exec(printed)?.[1] !== undefined).toBe(name !== "cpu");
    expect(diffPlans(plan, made).summary.some(({ what }) => what === "memory scratch")).toBe(name !== "cpu");
    // the bars of the picture are as wide as the parts, and end at the peak
    const [{ memory }] = view.roles as [(typeof view.roles)[number]];
    const bars = [...drawPlan(made).matchAll(/<g><title>(\w+) [\d.]+ \w+<\/title><rect x="([\d.]+)" y="0" width="([\d.]+)"/g)].slice(
      0,
      memoryKinds.length,
    );
    expect(bars.map(([, part]) => part)).toEqual(memoryKinds.map((kind) => memoryNames[kind]));
    const unit = Number(bars[0]![3]) / memory.parameter;
    for (const [i, kind] of memoryKinds.entries()) expect(Number(bars[i]![3]), kind).toBeCloseTo(unit * memory[kind], 0);
  },
);

test("every rank is a member of its own groups on both grids", () => {
  for (let rank = 0; rank < plan.mesh.world; rank++) {
    const { axes } = inspectRank(plan, rank);
    for (const { axis, coordinate, size, group } of axes) {
      expect(group, axis).toHaveLength(size);
      expect(group[coordinate], axis).toBe(rank);
    }
  }
});

test("the picture of 1F1B: forward follows the previous stage, backward the next stage", () => {
  const orders = ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"];
  expect(drawSchedule(orders.map(blockRuns), 1).rows.join("\n")).toMatchInlineSnapshot(`
    "stage 0 | F0 F1 .  .  B0 -- F2 B1 -- .  B2 --
    stage 1 | .  F0 B0 -- F1 B1 -- F2 B2 -- .  ."
  `);
});

test("diff sums the traffic of the parts of an axis: both exchanges of once_per_node are those of expert ranks", () => {
  const mesh = ["parallel.pipeline=1", "parallel.tensor=1", "parallel.sequence=false", "parallel.expert=4", "cluster.gpus_per_node=2"];
  const [each, once] = [planOf(...mesh), planOf(...mesh, "model.moe.dispatch=once_per_node")];
  const lines = printDiff(diffPlans(each, once)).replace(/\s+/g, " ");
  expect(lines).toMatch(/expert \(ep\) traffic a step: [\d.]+ KiB -> [\d.]+ KiB \(-\d+ %\) across nodes/);
  expect(lines).not.toMatch(/ep\/\d+@\d+ traffic/);
});
