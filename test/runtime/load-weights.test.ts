/** Weights that devices load from files equal those that the host converts, on any mesh; a rank reads little beyond its shards. */
import { truncateSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { checkpointFor, toHuggingFace } from "../../runtime/checkpoint/hf.ts";
import { loadShards } from "../../runtime/checkpoint/loadWeights.ts";
import { type FilePiece, readsFor } from "../../runtime/checkpoint/pieces.ts";
import { writeSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { RankPrograms } from "../../runtime/rankPrograms.ts";
import { Parameters } from "../../runtime/train/parameters.ts";
import { encoded, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import type { Plan } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { moe, planOf, standInWithFolder } from "../support/cudaRanks.ts";
import { noCompiler } from "../support/cudaStandIn.ts";
import { sameNumbers } from "../support/job.ts";
import { full } from "../support/tiers.ts";

const { folder, open, complaint } = standInWithFolder("rankc-load-");

/** A checkpoint of a plan's model with other values in every element, or one that is spoiled. */
function checkpointOf(plan: Plan, name: string, spoil?: string): string {
  const path = join(folder, `${name}.safetensors`);
  const parameters = new Map(
    plan.programs.flatMap((p) => p.parameters.map((own) => [own.name, p.buffers.find((b) => b.id === own.buffer)!.sizes] as const)),
  );
  let seed = 0;
  const named = {
    get: (parameter: string) => {
      const shape = parameters.get(parameter);
      if (!shape) return undefined;
      seed++;
      const data = Float32Array.from({ length: elementsOf(shape) }, (_, i) => Math.sin(i * 0.37 + seed));
      return { shape, data: parameter === spoil ? data.with(5, Number.NaN) : data };
    },
  };
  writeSafetensors(path, toHuggingFace(plan.job.model, named));
  return path;
}

const jobs: Readonly<Record<string, Plan>> = {
  "one rank in fp32": planOf({ world: 1 }, { moe }),
  "tensor and expert ranks": planOf({ world: 4, tensor: 2, sequence: true, expert: 2 }, { moe }),
  "experts cut along their width, bf16": planOf(
    { world: 2, tensor: 2, sequence: true, expert_tensor: 2, expert: 1 },
    { moe },
    { precision: "bf16" },
  ),
  "main weights cut further than 16-bit ones": planOf({ world: 4, tensor: 2, distributed_optimizer: true }, {}, { precision: "bf16" }),
};

describe.skipIf(noCompiler)(`on the stand-in${noCompiler}`, () => {
  test.each(Object.entries(jobs))("%s: every buffer is what the host would write", async (name, compiled) => {
    const { plan, all } = await open(compiled);
    const checkpoint = checkpointFor(plan.job.model, checkpointOf(plan, name.replaceAll(" ", "-")));
    const programs = new RankPrograms(plan);
    const lines: string[] = [];
    for (const localRanks of all) {
      const [rank = 0] = localRanks.ranks;
      const parameters = new Parameters(plan, programs, localRanks);
      const shards = parameters.shardsOf(rank).map(({ parameter, buffers, sizes, ranges }) => ({
        pieces: checkpoint.pieces(parameter.name, sizes, ranges)!,
        target: buffers,
      }));
      await loadShards(localRanks.rankDevice(rank).openLoader!(), shards, (line) => lines.push(line));
      for (const { parameter, buffers } of parameters.shardsOf(rank))
        for (const b of buffers) {
          const wanted = parameters.shardFor(checkpoint.read(parameter.name, b.sizes), b, rank);
          const rounded = valuesIn(typedMemory(b.dtype, encoded(b.dtype, wanted).words.slice().buffer as ArrayBuffer));
          const read = await localRanks.rankDevice(rank).read(b, 0);
          expect(sameNumbers(read, rounded), `${parameter.name} in ${b.id}`).toBe(true);
        }
    }
    await Promise.all(all.map((localRanks) => localRanks.close()));
    expect(complaint()).toBeUndefined();
    expect(lines.at(-1)).toMatch(/^reading weights: 0\.\d\d of 0\.\d\d GB, .* GB\/s, 0 s left$/);
    checkpoint.close();
  });

  test.each(["a value that is not finite", "a file that was cut after it was opened"])("%s: an error that names it", async (fault) => {
    const { plan, all } = await open(planOf({ world: 1 }));
    const [localRanks] = all;
    const path = checkpointOf(plan, "faulty", fault.includes("finite") ? "layers.1.wk" : undefined);
    const checkpoint = checkpointFor(plan.job.model, path);
    if (fault.includes("cut")) truncateSync(path, 2000);
    const parameters = new Parameters(plan, new RankPrograms(plan), localRanks!);
    const shards = parameters.shardsOf(0).map(({ parameter, buffers, sizes, ranges }) => ({
      pieces: checkpoint.pieces(parameter.name, sizes, ranges)!,
      target: buffers,
    }));
    await expect(loadShards(localRanks!.rankDevice(0).openLoader!(), shards)).rejects.toThrow(
      fault.includes("finite")
        ? /faulty\.safetensors: model\.layers\.1\.self_attn\.k_proj\.weight has a value that is not finite/
        : /became shorter/,
    );
    await localRanks!.close();
    checkpoint.close();
  });
});

test("reads hold every element of every piece once, within the limit, and little else", full, () => {
  const tensor = (start: number) => ({ path: start % 2 ? "a" : "b", name: `t${start}`, dtype: "BF16", start });
  const pieceOf = fc
    .record({
      start: fc.nat(500_000),
      at: fc.nat(50),
      rows: fc.integer({ min: 1, max: 9 }),
      columns: fc.integer({ min: 1, max: 60 }),
      gap: fc.constantFrom(0, 7, 40_000),
    })
    .map(
      ({ start, columns, gap, ...rest }): FilePiece => ({
        ...rest,
        tensor: tensor(start),
        columns,
        stride: columns + gap,
        to: 0,
        rowStep: columns,
        columnStep: 1,
      }),
    );
  fc.assert(
    fc.property(fc.array(pieceOf, { maxLength: 8 }), fc.integer({ min: 16, max: 400_000 }), (pieces, most) => {
      const reads = readsFor(
        pieces.map((piece, of) => ({ piece, of })),
        () => 2,
        most,
      );
      const found = pieces.map(() => new Map<number, number>());
      for (const read of reads) {
        expect(read.bytes).toBeLessThanOrEqual(most);
        for (const { piece: p, offset, of } of read.pieces)
          for (let r = 0; r < p.rows; r++)
            for (let c = 0; c < p.columns; c++) {
              const byte = offset + 2 * (r * p.stride + c);
              expect(byte + 2).toBeLessThanOrEqual(read.bytes);
              const to = p.to + r * p.rowStep + c * p.columnStep;
              expect(found[of]!.has(to)).toBe(false);
              found[of]!.set(to, read.from + byte);
            }
      }
      for (const [n, p] of pieces.entries()) {
        expect(found[n]!.size).toBe(p.rows * p.columns);
        for (let r = 0; r < p.rows; r++)
          for (let c = 0; c < p.columns; c++) expect(found[n]!.get(r * p.columns + c)).toBe(p.tensor.start + 2 * (p.at + r * p.stride + c));
      }
    }),
    { numRuns: 30 },
  );
});
