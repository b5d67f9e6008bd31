/** Gradients that the first microbatch writes: which instructions have a first kernel, and where their gradients lie. */
import { expect, test } from "vitest";
import { instructionsOf, writtenFirst } from "../../schemas/program.ts";
import { cpu, type Target } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { jobOf } from "../support/job.ts";

const planOf = (microbatches: number, model: object = {}, target: Target = { ...cpu, writesFirst: true }) => {
  const { plan } = compile(
    jobOf({
      name: "first",
      model: { layers: 2, hidden: 16, ffn: 24, heads: 4, vocab: 256, seq: 8, ...model },
      parallel: { world: 1 },
      train: { micro_batch: 1, global_batch: microbatches, steps: 4, optimizer: { lr: 1e-3 } },
      data: { path: "corpus.txt" },
    }),
    { target },
  );
  const [program] = plan.programs;
  const [memory] = plan.memory;
  if (!program || !memory) throw new Error("the plan has no stage");
  return { program, memory, kernels: new Map(plan.kernels.map((k) => [k.id, k])) };
};
const withFirst = ({ program }: ReturnType<typeof planOf>) =>
  instructionsOf(program).flatMap((i) => (i.kind === "compute" && i.first_kernel !== undefined ? [{ ...i, first: i.first_kernel }] : []));

test("every weight matrix of one writer has a first kernel, which adds to nothing; the embedding's is written by its own op", () => {
  const plan = planOf(4);
  const matrices = plan.program.parameters.filter((p) => !/norm/.test(p.name)).map((p) => p.gradient);
  expect(writtenFirst(plan.program)).toEqual(new Set(matrices));
  for (const { kernel, first } of withFirst(plan)) {
    expect(plan.kernels.get(first)?.accumulates).toBeUndefined();
    expect(plan.kernels.get(kernel)?.accumulates).toHaveLength(1);
  }
});

test("a gradient of two writers is added to from the start", () => {
  const plan = planOf(4, { tie_embeddings: true });
  expect(writtenFirst(plan.program)).not.toContain("embed.grad");
  expect(writtenFirst(plan.program).size).toBe(14);
});

test("a step of one microbatch needs no kernel that adds", () => {
  for (const { kernel, first } of withFirst(planOf(1))) expect(kernel).toBe(first);
});

test("a target that runs no first kernels has none", () => {
  expect(withFirst(planOf(4, {}, cpu))).toEqual([]);
});

test("gradients that need zeros lie before those that do not", () => {
  const { program, memory } = planOf(4);
  const written = writtenFirst(program);
  const offsets = (isWritten: boolean) =>
    program.buffers.filter((b) => b.kind === "gradient" && written.has(b.id) === isWritten).map((b) => memory.offsets[b.id] ?? 0);
  expect(Math.max(...offsets(false))).toBeLessThan(Math.min(...offsets(true)));
});
