/** The data of the page of `rankc view`: they are the plan's, and do not grow with the number of ranks. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { blocksOf } from "../../schemas/program.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { MemoryCurve } from "../../src/page/memoryCurve.ts";
import { turnsOf } from "../../src/page/pairTurns.ts";
import { PlanModel } from "../../src/page/planModel.ts";
import { addTraffic } from "../../src/page/traffic.ts";
import { trafficOf } from "../../src/report/overview.ts";
import { viewData } from "../../src/report/view/readPlanView.ts";
import { root } from "../support/checkout.ts";

const path = join(root, "plans/tiny-interleaved/job.yaml");
function viewed(sets: readonly string[] = []) {
  const { plan } = compile(readJob(readFileSync(path, "utf8"), path, sets).job!);
  const data = viewData([{ plan, job: { text: "", places: {} }, warnings: [] }]);
  return { plan, data, model: new PlanModel(data.plans[0]!, 0) };
}
const { plan, data, model } = viewed();

test("every instruction of the plan is in the data, in its order", () => {
  for (const { stage, ...program } of plan.programs)
    for (const { kind, chunk, instructions } of blocksOf(program)) {
      const shown = model.instructions(stage, model.block(stage, kind, chunk)!);
      expect(shown.map(({ id }) => id)).toEqual(instructions.map(({ id }) => id));
      for (const [n, i] of instructions.entries()) {
        if (i.kind === "collective") expect(shown[n]!.view).toMatchObject({ does: i.name, axes: i.axes, path: i.why.path });
        if (i.kind === "send") expect(model.ranksOf(shown[n]!, model.firstRank(stage))).toHaveLength(2);
      }
    }
});

test("equal layers are stored once", () => {
  const { plan, data } = viewed(["model.layers=16"]);
  const all = plan.programs.reduce((sum, program) => sum + blocksOf(program).reduce((n, b) => n + b.instructions.length, 0), 0);
  const stored = data.plans[0]!.parts.reduce((sum, { instructions }) => sum + instructions.length, 0);
  expect(stored).toBeLessThan(0.6 * all);
});

test("collectives have the answer of --why", () => {
  const found = data.plans[0]!.parts.flatMap(({ instructions }) => instructions).filter(({ kind }) => kind === "collective");
  expect(found.length).toBeGreaterThan(5);
  for (const { why } of found) expect(why?.because.length).toBeGreaterThan(0);
});

test("twice as many ranks have data of the same size", () => {
  const size = (value: object): number => JSON.stringify(value).length;
  const { world } = plan.mesh;
  const more = viewed([`parallel.world=${2 * world}`, `train.global_batch=${2 * plan.job.train.global_batch}`]);
  expect(more.plan.mesh.world).toBe(2 * world);
  expect(size(more.data)).toBeLessThan(1.1 * size(data));
});

test("block runs have the times of the schedule, and each waits for the run that it receives from", () => {
  for (const [stage, runs] of model.runs.entries()) {
    expect(runs.length).toBe(plan.programs[stage]!.order.length);
    for (const [i, run] of plan.programs[stage]!.order.entries()) {
      expect(runs.place(["forward", "backward", "weights"].indexOf(run.kind), run.microbatch, run.chunk)).toBe(i);
      expect(runs.at((runs.start[i]! + runs.end[i]!) / 2)).toBe(i);
    }
  }
});

test("pairs are marked, and their turns are the instructions of both runs", () => {
  const profile = packageProfile("h100-80gb");
  const mixtral = join(root, "plans/tiny-mixtral/job.yaml");
  const sets = ["parallel.expert_overlap=interleave", "train.global_batch=64"];
  const { plan } = compile(readJob(readFileSync(mixtral, "utf8"), mixtral, sets).job!);
  for (const timed of [undefined, profile]) {
    const [view] = viewData([{ plan, job: { text: "", places: {} }, warnings: [], ...(timed && { profile: timed }) }]).plans;
    const shown = new PlanModel(view!, 0);
    for (const { stage, order, chunks } of plan.programs) {
      const runs = shown.runs[stage]!;
      const paired = order.flatMap((run, i) => (run.kind === "forward" && run.paired ? [i] : []));
      expect(paired.length).toBeGreaterThan(0);
      expect(order.flatMap((_, i) => (runs.partnerOf(i) === i + 1 ? [i] : []))).toEqual(paired);
      const turns = turnsOf(shown, stage, runs, paired[0]!);
      const idsOf = (run: number) =>
        turns.filter((turn) => turn.run === run).flatMap(({ instructions }) => instructions.map(({ id }) => id));
      expect(idsOf(paired[0]!)).toEqual(chunks[0]!.forward.map(({ id }) => id));
      expect(idsOf(paired[0]! + 1)).toEqual(chunks[0]!.backward.map(({ id }) => id));
    }
  }
});

test("with a device profile, times are the seconds of the estimate; instructions are within their runs, and the optimizer step ends a stage", () => {
  const profile = packageProfile("h100-80gb");
  const [timed] = viewData([{ plan, job: { text: "", places: {} }, warnings: [], profile }]).plans;
  const { timeline, inspection } = timed!;
  expect(timeline.unit).toBe("seconds");
  expect(timeline.end).toBeCloseTo(inspection.estimate!.seconds, 9);
  const own = new PlanModel(timed!, 0);
  for (const [stage, runs] of own.runs.entries()) {
    expect(runs.length).toBe(plan.programs[stage]!.order.length + 1);
    expect(runs.tag(runs.length - 1)).toBe("step");
    const block = own.block(stage, "forward", 0)!;
    const slots = own.slots(stage, block);
    expect(slots).toHaveLength(2 * own.instructions(stage, block).length);
    for (const [n, share] of slots.entries()) expect(n % 2 === 0 ? share >= 0 && share <= 1 : share >= slots[n - 1]!).toBe(true);
  }
});

test("what is alive never exceeds what is reserved, and reaches the activations of all copies", () => {
  for (const memory of plan.memory) {
    const curve = new MemoryCurve(model, memory.stage);
    const { activation, workspace } = curve.most(0, data.plans[0]!.timeline.end);
    const reserved = memory.peak - memory.parameter - memory.gradient - memory.optimizer - memory.scratch;
    expect(activation + workspace).toBeLessThanOrEqual(reserved);
    expect(activation + workspace).toBeGreaterThan(0.5 * reserved);
    const groups = curve.aliveAt(curve.runs.start[3]! + 0.01);
    expect(groups.some(({ kind }) => kind === "activation")).toBe(true);
    expect(groups.map(({ bytes }) => bytes)).toEqual(groups.map(({ bytes }) => bytes).sort((a, b) => b - a));
  }
});

test("the matrix has the bytes of the report, inside of nodes and across", () => {
  const { world, gpus_per_node } = plan.mesh;
  const cells = new Float32Array(world * world);
  addTraffic(model, cells, (axes) => axes !== "world");
  for (const { roles } of [data.plans[0]!.inspection])
    for (const role of roles) {
      let [inside, across] = [0, 0];
      for (const from of role.ranks)
        for (let to = 0; to < world; to++) {
          const bytes = cells[from * world + to]! / role.ranks.length;
          if (Math.floor(from / gpus_per_node) === Math.floor(to / gpus_per_node)) inside += bytes;
          else across += bytes;
        }
      const rows = trafficOf(role).filter(({ axes }) => axes !== "world");
      const sum = (part: "inside" | "across"): number => rows.reduce((total, row) => total + row[part], 0);
      expect(inside / Math.max(1, sum("inside"))).toBeCloseTo(1, 5);
      expect(across).toBeCloseTo(sum("across"), 0);
    }
});
