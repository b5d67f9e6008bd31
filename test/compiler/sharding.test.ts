/** The parts of the sharding pass alone: which rule chooses a dim, and which steps lead from one layout to another. */
import { expect, test } from "vitest";
import { compile } from "../../src/compile.ts";
import { gemm } from "../../src/ops/gemm.ts";
import { rmsnorm } from "../../src/ops/norm.ts";
import { changed, type Node, type Value } from "../../src/ops/op.ts";
import { type Layout, pairs } from "../../src/passes/layout.ts";
import { buildMesh } from "../../src/passes/mesh.ts";
import { type Choice, chooseDims, orderSubAxes, usesOf } from "../../src/passes/sharding/dimChoice.ts";
import { Placements } from "../../src/passes/sharding/placements.ts";
import { Resharder } from "../../src/passes/sharding/resharder.ts";
import type { CollectiveStep, ShardStep } from "../../src/passes/sharding/steps.ts";
import { jobOf, parallelOf } from "../support/job.ts";

/** Four ranks: sub-axis 0 is tp, sub-axis 1 is dp. */
const mesh = buildMesh({
  model: { kv_heads: 4 },
  parallel: parallelOf({ world: 4, tensor: 2, data: 2 }),
  cluster: { nodes: 1, gpus_per_node: 4, device: "cpu" },
});
const [tp, dp] = [0, 1];
const leaf = (kind: "parameter" | "input", name: string, sizes: readonly number[]): Value => ({
  ...{ out: 0, ragged: 0, fanout: 0, dtype: "f32", sizes },
  leaf: { kind, name, position: 0 },
});
const layout = (shardedBy: Layout["shardedBy"], partialSum: readonly number[] = []): Layout => ({ shardedBy, partialSum, partialMax: [] });
const nodeOf = (v: Value): Node => {
  if (!v.node) throw new Error("a leaf has no node");
  return v.node;
};

/** Returns the choices of both sub-axes for a product whose operands have the given layouts. */
function choicesFor(x: Layout, w: Layout, pins?: Node["pins"]) {
  const placements = new Placements(mesh);
  const [a, b] = [leaf("input", "x", [4, 8, 16]), leaf("parameter", "w", [16, 32])] as const;
  placements.place(a, x, 0);
  placements.place(b, w, 0);
  const node = changed(nodeOf(gemm.of({ x: a, w: b }, {}, "product")), { pins });
  const uses = usesOf(node);
  const chosen = chooseDims(uses, placements, new Map());
  return {
    chosen: chosen.map(({ dim, partial }) => (partial ? "partial" : (dim ?? "none"))),
    dims: orderSubAxes(uses, chosen, placements),
  };
}

test("a parameter's dim comes before that of an activation: parameters are not resharded", () => {
  expect(choicesFor(layout([[], [tp], []]), layout([[], [tp]])).chosen).toEqual(["N", "none"]);
});

test("a pin comes before a parameter", () => {
  const pin = [{ dim: "B", axis: "tp", path: "parallel.tensor" }];
  expect(choicesFor(layout([[], [], []]), layout([[], [tp]]), pin).chosen).toEqual(["B", "none"]);
});

test("without a parameter's vote the dim on which operands agree is kept, and the inner dim makes the product partial", () => {
  expect(choicesFor(layout([[dp], [tp], []]), layout([[], []])).chosen).toEqual(["S", "B"]);
  expect(choicesFor(layout([[], [], [tp]]), layout([[tp], []])).chosen).toEqual(["K", "none"]);
});

test("sub-axes of one dim keep the order that the parameter has", () => {
  expect(choicesFor(layout([[], [], []]), layout([[], [tp, dp]])).dims.get("N")).toEqual([tp, dp]);
  expect(choicesFor(layout([[], [], []]), layout([[], [dp, tp]])).dims.get("N")).toEqual([dp, tp]);
});

test("a partial sum that the op cannot pass on is reduced, and the origin names it", () => {
  const placements = new Placements(mesh);
  const [x, gain] = [leaf("input", "x", [4, 8, 16]), leaf("parameter", "gain", [16])] as const;
  placements.place(x, layout([[], [], []], [tp]), 0);
  placements.place(gain, layout([[]]), 0);
  const uses = usesOf(nodeOf(rmsnorm.of({ x, gain }, { eps: 1e-6 })));
  const [first] = chooseDims(uses, placements, new Map());
  expect(first?.by(uses)).toBe("the value is partial, and the op needs the reduced value");
});

/** Returns the steps between two layouts of a value [8,8]. */
function stepsBetween(from: Layout, to: Layout): CollectiveStep["how"][] {
  const placements = new Placements(mesh);
  const v = leaf("parameter", "v", [8, 8]);
  placements.place(v, from, 0);
  const into: ShardStep[] = [];
  const resharder = new Resharder(placements, (stage) => stage);
  const destination = { stage: 0, backward: false, why: () => ({ op: "", because: "", path: "", position: undefined }), into };
  const copy = resharder.reshard(v, to, destination);
  expect(copy.layout).toEqual(to);
  const { length } = into;
  // a copy is made once
  resharder.reshard(v, to, destination);
  expect(into).toHaveLength(length);
  return into.flatMap((s) => (s.kind === "collective" ? [s.how] : []));
}

test.each([
  ["replicated to sharded", layout([[], []]), layout([[tp], []]), ["slice"]],
  ["sharded to replicated", layout([[tp], []]), layout([[], []]), ["all_gather"]],
  ["one dim to another", layout([[tp], []]), layout([[], [tp]]), ["all_to_all"]],
  ["partial to replicated", layout([[], []], [dp]), layout([[], []]), ["all_reduce"]],
  ["partial to sharded", layout([[], []], [dp]), layout([[dp], []]), ["reduce_scatter"]],
  ["two sub-axes, each its own way", layout([[tp], []], [dp]), layout([[], [dp]]), ["reduce_scatter", "all_gather"]],
  ["another order of sub-axes", layout([[tp, dp], []]), layout([[dp, tp], []]), ["all_gather", "slice"]],
] as const)("reshard: %s", (_, from, to, how) => {
  expect(stepsBetween(from, to)).toEqual(how);
});

test("a layout whose blocks do not divide a dim is refused, and so are lists of different lengths", () => {
  expect(() => new Placements(mesh).place(leaf("input", "x", [3]), layout([[tp]]), 0)).toThrow(
    "x: dim 0 of 3 elements does not divide by 2",
  );
  expect(() => pairs([1], [1, 2])).toThrow("lists of 1 and 2 elements");
});

const stepJob = (distributed_optimizer: boolean) =>
  jobOf({
    name: "step",
    model: { layers: 1, hidden: 16, heads: 4, ffn: 32, vocab: 256, seq: 8 },
    parallel: { world: 4, tensor: 2, distributed_optimizer },
    train: { global_batch: 2, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });
const linesOf = (text: string, of: RegExp): string[] => text.split("\n").filter((line) => of.test(line));

test("the optimizer step is sharded like any other graph: gradients enter as partial sums, state stays where it is", () => {
  expect(linesOf(compile(stepJob(true)).emit("sharded"), /^0 .*layers\.0\.wq\.(grad|adamw|cast)/)).toMatchInlineSnapshot(`
    [
      "0   reduce_scatter over dp: layers.0.wq.grad [16,16@tp] partial over dp -> [16@dp,16@tp]  for gradient of layers.0.wq: each rank saw other tokens (parallel.data)",
      "0 layers.0.wq.adamw = adamw_cast(layers.0.wq.grad, clip.scale, lr, step) -> [16@dp,16@tp], [16@dp,16@tp], [16@dp,16@tp], [16@dp,16@tp]",
      "0   all_gather over dp: layers.0.wq.adamw.y [16@dp,16@tp] -> [16,16@tp]  for layers.0.wq.adamw: each rank updated its shard (parallel.distributed_optimizer)",
    ]
  `);
  expect(linesOf(compile(stepJob(false)).emit("sharded"), /^0 .*layers\.0\.wq\.(grad|adamw|cast)/)).toMatchInlineSnapshot(`
    [
      "0   all_reduce over dp: layers.0.wq.grad [16,16@tp] partial over dp -> [16,16@tp]  for gradient of layers.0.wq: each rank saw other tokens (parallel.data)",
      "0 layers.0.wq.adamw = adamw_cast(layers.0.wq.grad, clip.scale, lr, step) -> [16,16@tp], [16,16@tp], [16,16@tp], [16,16@tp]",
    ]
  `);
});

test("a random choice does not move state: in-place ops run in its layout", () => {
  const updateOf = (pick?: () => Choice) => linesOf(compile(stepJob(false), pick ? { pick } : {}).emit("sharded"), /\.w\d\.adamw = /);
  expect(updateOf(() => ({ by: () => "test" }))).toEqual(updateOf());
});

test("instructions on any shape have numbered dims alone, so that equal local sizes share a kernel", () => {
  const { programs } = compile(stepJob(true)).plan;
  const dims = programs.flatMap((p) => p.step.flatMap((i) => (i.kind === "compute" ? Object.keys(i.dims) : [])));
  expect(dims.length).toBeGreaterThan(20);
  expect(dims).not.toContain("...");
});
