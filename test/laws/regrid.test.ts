/**
 * Grids that do not nest meet in a regrid alone: a rank keeps its tokens, which get other indices. A value that both grids shard at once would
 * be twice on some ranks and missing on others: it is refused.
 */
import { describe, expect, test } from "vitest";
import type { Collective, Instruction, Plan } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { isDisjointSubAxes, rankCoordinate, shardCount } from "../../schemas/sharding.ts";
import { compile } from "../../src/compile.ts";
import { add } from "../../src/ops/gemm.ts";
import { declared, type Value } from "../../src/ops/op.ts";
import { regridded } from "../../src/ops/regrid.ts";
import { buildMesh, hasSeparateGrids } from "../../src/passes/mesh.ts";
import { shard } from "../../src/passes/shard.ts";
import { verifyPrograms } from "../../src/passes/verify.ts";
import { jobOf, parallelOf } from "../support/job.ts";

const cluster = { nodes: 1, gpus_per_node: 8, device: "cpu" } as const;
const job = (parallel: object) =>
  jobOf({
    name: "regrid",
    model: {
      ...{ layers: 1, hidden: 24, heads: 6, vocab: 258, seq: 24 },
      moe: { experts: 6, top_k: 2, ffn: 24, router: { balance: "aux_loss", aux_coeff: 0.1 } },
    },
    parallel,
    train: { global_batch: 6, steps: 1, precision: "fp32", optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });
const sixRanks = { world: 6, tensor: 2, sequence: true, expert: 3 };

test("tokens and the map, then the weights, are regridded for the experts' grid; results of experts are regridded back; no byte leaves a rank", () => {
  const { plan, emit } = compile(job(sixRanks));
  const lines = emit("sharded").split("\n");
  const regrids = lines.filter((l) => / regrid: /.test(l)).map((l) => l.replace(/^\d+ +regrid: (.*) {2}for .*/, "$1"));
  expect(regrids).toMatchInlineSnapshot(`
    [
      "layers.0.mlp.norm [3@dp,24@tp,24] -> layers.0.moe.permute.x [6@ep*edp,12,24]",
      "layers.0.moe.top_k_mask [3@dp,24@tp,6] -> layers.0.moe.permute.c [6@ep*edp,12,6]",
      "layers.0.moe.combine_weights [3@dp,24@tp,6] -> layers.0.moe.pack.p [6@ep*edp,12,6]",
      "layers.0.moe.unpermute [6@ep*edp,12,24] -> layers.0.moe.unpermute.x [3@dp,24@tp,24]",
      "final.norm.grad.dx [3@dp,24@tp,24] -> layers.0.moe.unpermute.x.grad [6@ep*edp,12,24]",
      "layers.0.moe.pack.grad [6@ep*edp,12,6] -> layers.0.moe.pack.p.grad [3@dp,24@tp,6]",
      "layers.0.moe.permute.grad [6@ep*edp,12,24] -> layers.0.moe.permute.x.grad [3@dp,24@tp,24]",
    ]
  `);
  const ids = instructionsOf(plan.programs[0]!).flatMap((i) => (i.id.endsWith(".regrid") ? [i.id] : []));
  expect(ids.slice(0, 4)).toEqual([
    "layers.0.moe.permute.x@ep*edp,-,-.regrid",
    "layers.0.moe.permute.c@ep*edp,-,-.regrid",
    "layers.0.moe.pack.p@ep*edp,-,-.regrid",
    "layers.0.moe.unpermute.x@dp,tp,-.regrid",
  ]);
  const moves = plan.programs.flatMap((p) => instructionsOf(p)).filter((i): i is Collective => i.kind === "collective");
  expect(new Set(moves.map((i) => i.axes))).toEqual(new Set(["tp", "dp", "tp*dp", "ep", "edp", "world"]));
});

test("nested grids need no regrid", () => {
  expect(compile(job({ world: 6, tensor: 2, sequence: true, expert: 6 })).emit("sharded")).not.toMatch(/ regrid: /);
});

test("every sharded dim of a plan uses sub-axes of one grid, which are different for each rank", () => {
  for (const parallel of [
    sixRanks,
    { world: 6, context: 3, expert: 2 },
    { world: 12, tensor: 2, sequence: true, context: 2, expert: 3, expert_tensor: 2 },
  ]) {
    const { mesh, programs } = compile(job(parallel)).plan;
    expect(hasSeparateGrids(mesh)).toBe(true);
    for (const { id, shardedBy, partial = [] } of programs.flatMap((p) => p.buffers)) {
      const fs = [...shardedBy.flat(), ...partial];
      expect(isDisjointSubAxes(mesh, fs), id).toBe(true);
      const seen = new Set(Array.from({ length: mesh.per_stage }, (_, r) => fs.map((f) => rankCoordinate(mesh, r, f)).join()));
      expect(seen.size, id).toBe(shardCount(mesh, fs));
    }
  }
});

describe("shard refuses", () => {
  const mesh = buildMesh({ model: { kv_heads: 2 }, parallel: parallelOf({ world: 6, tensor: 2, data: 3, expert: 3 }), cluster });
  const leaf = (name: string, sizes: number[], shardAxes: string[][]): Value => ({
    ...{ out: 0, ragged: 0, fanout: 0, dtype: "f32", sizes, shardAxes, leaf: { kind: "input", name, position: 0 } },
  });
  const shardOf = (y: Value): unknown => {
    const [none, nothing] = [[], new Map()] as const;
    const graph = {
      updates: none,
      scalars: nothing,
      losses: none,
      parameters: none,
      order: [y.node!],
      grad: nothing,
      parameterGrads: nothing,
      gradOf: nothing,
    };
    return shard(graph, mesh, { distributedOptimizer: false, shares: () => true, stageOf: () => 0, roleOf: () => 0 });
  };
  const grids = { from: [["dp"], ["tp"], []], to: [["edp", "ep"], [], []] };
  const tokens = (shardAxes: string[][] = grids.from) => leaf("x", [6, 4, 2], shardAxes);

  test("a regrid between layouts that distinguish all ranks", () =>
    expect(() => shardOf(regridded(tokens(), [12, 2], grids))).not.toThrow());
  test("an op on values of two grids", () => {
    const y = add.of({ a: leaf("a", [6, 6], [["tp"], []]), b: leaf("b", [6, 6], [[], ["ep"]]) }, {}, "y");
    expect(() => shardOf(y)).toThrow("a would be sharded by tp*ep, which are of grids that do not nest");
  });
  test("a reshard from one grid to the other", () => {
    const y = add.of({ a: leaf("a", [6, 6], [["dp"], []]), b: leaf("b", [6, 6], [["dp"], []]) }, {}, "y");
    expect(() => shardOf(declared(y, { shardAxes: [[], ["ep"]] }))).toThrow(
      "y would be sharded by dp*ep, which are of grids that do not nest",
    );
  });
  test("a regrid of tokens that several ranks hold", () =>
    expect(() => shardOf(regridded(tokens(), [12, 2], { ...grids, from: [["dp"], [], []] }, "y"))).toThrow(
      "y: two ranks would have the same tokens",
    ));
  test("a regrid to more tokens than a rank has", () =>
    expect(() => shardOf(regridded(tokens(), [12, 4], grids, "y"))).toThrow("y: the local size of dim 1 differs between the grids"));
});

test("a collective over factors of both grids is refused in a program", () => {
  const { programs, mesh } = structuredClone(compile(job(sixRanks)).plan) as Plan;
  const list = programs[0]!.chunks[0]!.forward as Instruction[];
  const at = list.findIndex((i) => i.kind === "collective" && i.axes === "ep");
  const i = list[at] as Collective;
  list[at] = { ...i, subAxes: [...mesh.axes.tp!, ...i.subAxes] };
  expect(() => verifyPrograms(programs, mesh)).toThrow(`${i.id} runs over sub-axes 0,2 of grids that do not nest`);
});
