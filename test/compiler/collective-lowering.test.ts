/** The parts of the lowering of collectives: axes in memory, and the copies between them. */
import { expect, test } from "vitest";
import type { Buffer } from "../../schemas/plan.ts";
import { arrangement, axesOf, blockAxesOf, isSameMemory } from "../../src/passes/collectives/memoryAxes.ts";
import { buildMesh } from "../../src/passes/mesh.ts";
import { jobOf } from "../support/job.ts";

const job = jobOf({
  name: "axes",
  model: { layers: 1, hidden: 64, heads: 4, vocab: 256, seq: 16 },
  parallel: { world: 4, tensor: 2, sequence: true },
  train: { global_batch: 2, steps: 1, precision: "fp32", optimizer: { lr: 1 } },
  data: { path: "x" },
});
const mesh = buildMesh(job);
const [tp = -1] = mesh.axes.tp;

test("a dim whose blocks are numbered by a sub-axis that does not shard it has that sub-axis before its block", () => {
  const whole: Buffer = { id: "x", kind: "workspace", dtype: "f32", shape: [4, 6], sizes: [4, 6], ragged: 0, shardedBy: [[], []] };
  expect(axesOf(mesh, whole, [[], [tp]], 0)).toEqual([
    { kind: "dim", dim: 0, size: 4 },
    { kind: "sub-axis", subAxis: tp, size: 2 },
    { kind: "dim", dim: 1, size: 3 },
  ]);
});

test("an all-gather along the last dim needs a copy; along the first it does not", () => {
  const group = blockAxesOf(mesh, [tp]);
  const [first, last] = [
    { kind: "dim", dim: 0, size: 4 },
    { kind: "dim", dim: 1, size: 3 },
  ] as const;
  expect(isSameMemory([...group, first, last], [...group, first, last])).toBe(true);
  expect(isSameMemory([...group, first, last], [first, ...group, last])).toBe(false);
  // rows of 3 from two blocks of 12 elements
  expect(arrangement(mesh, [...group, first, last], [first, ...group, last], [])).toEqual({
    attrs: { n0: 4, s0: 3, n1: 2, s1: 12, n2: 3, s2: 1 },
    blocks: [],
  });
});

test("a slice reads from the block of this rank on; contiguous axes are one", () => {
  const group = blockAxesOf(mesh, [tp]);
  const rest = { kind: "dim", dim: 1, size: 3 } as const;
  expect(arrangement(mesh, [...group, rest], [rest], [tp])).toEqual({ attrs: { n0: 3, s0: 1 }, blocks: [{ subAxis: tp, stride: 3 }] });
  expect(arrangement(mesh, [...group, rest], [...group, rest], []).attrs).toEqual({ n0: 6, s0: 1 });
});
