/** Every schedule and every layout compiles: no value is read before it is made, and no stage waits for ever. Nothing is run. */
import fc from "fast-check";
import { expect, test } from "vitest";
import type { Job } from "../../schemas/job.ts";
import { lower } from "../../src/passes/lower.ts";
import { planMemory } from "../../src/passes/memory.ts";
import { buildMesh } from "../../src/passes/mesh.ts";
import { schedule } from "../../src/passes/schedule.ts";
import { shardJob } from "../../src/passes/shardJob.ts";
import { verifyPrograms } from "../../src/passes/verify.ts";
import { jobOf } from "../support/job.ts";
import { draws } from "../support/tiers.ts";

const jobWith = (model: object, parallel: object, global_batch = 1): Job =>
  jobOf({
    name: "order",
    model: { hidden: 4, ffn: 4, heads: 1, head_dim: 4, vocab: 256, seq: 4, ...model },
    parallel,
    train: { global_batch, steps: 1, optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });
const each = (n: number): number[] => Array.from({ length: n }, (_, i) => i + 1);

/** Lowers and verifies a job for each number of microbatches, and for every smaller step of a growing batch; the model is sharded once. */
function verifyAll(job: Job, microbatches: readonly number[]): void {
  const mesh = buildMesh(job);
  const { graph, sharded, pipeline } = shardJob(job, mesh);
  for (const m of microbatches) {
    const order = schedule({ ...job, train: { ...job.train, global_batch: m } }, pipeline.chunks);
    const programs = lower(job, mesh, { graph, sharded, pipeline, order });
    verifyPrograms(programs, mesh, m === microbatches.at(-1) ? each(m - 1) : []);
    for (const p of programs) planMemory(p);
  }
}

test.each(each(4).flatMap((stages) => each(4).map((chunks) => [stages, chunks] as const)))(
  "%i stages of %i chunks, 1 to 16 microbatches",
  (stages, chunks) => {
    // what a block waits for is the same without a layer: its output is passed on
    const parallel = { world: stages, pipeline: stages, layout: `Et${"|".repeat(stages * chunks - 1)}L` };
    verifyAll(jobWith({ layers: 1 }, parallel), each(16));
    if (stages > 1) verifyAll(jobWith({ layers: 1 }, { ...parallel, schedule: "zero_bubble" }), each(16));
  },
);

/** A layout's letters, dealt to its parts in order; some parts get none. */
const layouts = fc
  .record({
    stages: fc.integer({ min: 1, max: 4 }),
    chunks: fc.integer({ min: 1, max: 4 }),
    layers: fc.integer({ min: 1, max: 3 }),
    mtp: fc.integer({ min: 0, max: 1 }),
    tie_embeddings: fc.boolean(),
    zero_bubble: fc.boolean(),
    microbatches: fc.integer({ min: 1, max: 12 }),
    dealt: fc.array(fc.nat(), { minLength: 5, maxLength: 5 }),
    separators: fc.boolean(),
  })
  .map(({ stages, chunks, layers, mtp, tie_embeddings, zero_bubble, microbatches, dealt, separators }) => {
    const count = stages * chunks;
    const at = dealt.slice(0, layers + 2).map((n) => n % count);
    const places = at.sort((a, b) => a - b);
    const last = places.at(-1)!;
    // multi-token prediction stands in the last chunk, past the first stage
    const ahead = stages > 1 && last % stages > 0 && last >= count - stages ? mtp : 0;
    const letters = ["E", ..."t".repeat(layers), `${"m".repeat(ahead)}L`];
    const parts = Array.from({ length: count }, (_, v) => letters.filter((_, p) => places[p] === v).join(separators ? ", " : ""));
    return {
      model: { layers, tie_embeddings, mtp: ahead > 0 ? { layers: ahead } : null },
      parallel: {
        ...{ world: stages, pipeline: stages, layout: parts.join("|") },
        ...(zero_bubble && stages > 1 ? { schedule: "zero_bubble" } : {}),
      },
      microbatches,
    };
  });

const runs = draws(40, 300);
test(`${runs} random layouts, with empty parts, commas and tied embeddings`, () => {
  let empty = 0;
  fc.assert(
    fc.property(layouts, ({ model, parallel, microbatches }) => {
      verifyAll(jobWith(model, parallel), [microbatches]);
      if (parallel.layout.split("|").includes("")) empty++;
    }),
    { numRuns: runs },
  );
  expect(empty).toBeGreaterThan(runs / 3);
});
