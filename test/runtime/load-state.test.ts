/** A checkpoint that devices load equals what the host would write, on the saved mesh and on others; what differs from its digest is an error. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { RankDevice } from "../../runtime/backend.ts";
import { type OpenCheckpoint, openCheckpoint } from "../../runtime/checkpoint/checkpoint.ts";
import { isLoadable, loadState } from "../../runtime/checkpoint/loadState.ts";
import { openSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { CheckpointSaver } from "../../runtime/checkpoint/saver.ts";
import { cutPiece, sharedPieces } from "../../runtime/checkpoint/statePieces.ts";
import { RankPrograms } from "../../runtime/rankPrograms.ts";
import { copyShared, lengthsOf, type Ranges, sharedBy } from "../../runtime/shards.ts";
import { Parameters } from "../../runtime/train/parameters.ts";
import { encoded, typedMemory, valuesIn } from "../../schemas/dtypes.ts";
import type { Buffer, Plan } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { moe, planOf, standInWithFolder } from "../support/cudaRanks.ts";
import { noCompiler } from "../support/cudaStandIn.ts";
import { sameNumbers } from "../support/job.ts";

const { folder, open, complaint } = standInWithFolder("rankc-load-state-");

/** Saves a checkpoint of a plan with other values in every element and returns its folder. */
async function checkpointOf(plan: Plan, name: string): Promise<string> {
  const device = (rank: number) =>
    ({
      read: async ({ id, shape }: Buffer) =>
        Float32Array.from({ length: elementsOf(shape) }, (_, i) => Math.sin(i * 0.37 + rank + id.length)),
    }) as unknown as RankDevice;
  const ranks = Array.from({ length: plan.mesh.world }, (_, r) => r);
  const saver = new CheckpointSaver({
    ...{ plan, folder: join(folder, name), version: "test", localRanks: { ranks, rankDevice: device }, threads: 0, digestBytes: 512 },
  });
  const { done } = await saver.begin({ steps: 1, read: 8, trained: 8, updates: 1, loss_scale: null });
  const { folder: at } = await done;
  await saver.close();
  return at;
}

const meshes = {
  "one rank": { world: 1 },
  "tensor and expert ranks": { world: 4, tensor: 2, sequence: true, expert: 2 },
  "a sharded optimizer": { world: 4, tensor: 2, sequence: true, distributed_optimizer: true },
};
const planFor = (mesh: keyof typeof meshes): Plan => planOf(meshes[mesh], { moe }, { precision: "bf16" });
const shardsOf = (parameters: Parameters, rank: number, checkpoint: OpenCheckpoint) =>
  parameters.stateOf(rank).map((shard) => ({ ...shard, target: shard.buffers, saved: checkpoint.savedShards(shard.name, shard.ranges) }));

describe.skipIf(noCompiler)(`on the stand-in${noCompiler}`, () => {
  test.each([
    ["one rank", "tensor and expert ranks"],
    ["tensor and expert ranks", "a sharded optimizer"],
    ["a sharded optimizer", "a sharded optimizer"],
  ] as const)("from %s to %s, every buffer is what the host would write", async (from, to) => {
    const at = await checkpointOf(planFor(from), `${from} to ${to}`);
    const checkpoint = openCheckpoint(at);
    const { plan, all } = await open(planFor(to));
    const lines: string[] = [];
    const wrong: string[] = [];
    for (const localRanks of all) {
      const [rank = 0] = localRanks.ranks;
      const device = localRanks.rankDevice(rank);
      const shards = shardsOf(new Parameters(plan, new RankPrograms(plan), localRanks), rank, checkpoint);
      const loader = device.openLoader?.();
      if (!loader) throw new Error("no loader");
      expect(shards.filter((shard) => !isLoadable(shard, loader.blockBytes)).map(({ name }) => name)).toEqual([]);
      // small blocks: a tensor needs several, and parts of several tensors share one
      await loadState({ ...loader, blockBytes: 2048 }, shards, (line) => lines.push(line));
      for (const { name, ranges, buffers } of shards)
        for (const b of buffers) {
          const { words } = encoded(b.dtype, checkpoint.shard(name, ranges));
          const wanted = valuesIn(typedMemory(b.dtype, words.slice().buffer as ArrayBuffer));
          if (!sameNumbers(await device.read(b, 0), wanted)) wrong.push(`${name} in ${b.id} of rank ${rank}`);
        }
    }
    expect(wrong).toEqual([]);
    expect(lines.at(-1)).toMatch(/^reading the checkpoint: 0\.\d\d of 0\.\d\d GB, .* GB\/s, 0 s left$/);
    await Promise.all(all.map((localRanks) => localRanks.close()));
    expect(complaint()).toBeUndefined();
    checkpoint.close();
  });

  test("a part that differs from its digest is an error that names the tensor; parts that the rank does not need are not read", async () => {
    const at = await checkpointOf(planFor("one rank"), "damaged");
    const path = join(at, "rank-00000.safetensors");
    const file = openSafetensors(path);
    const { start, bytes } = file.info("embed");
    file.close();
    const all = readFileSync(path);
    all[start + bytes - 1]! ^= 1;
    writeFileSync(path, all);
    const checkpoint = openCheckpoint(at);
    const { plan, all: ranks } = await open(planFor("tensor and expert ranks"));
    const ends = await Promise.all(
      ranks.map(async (localRanks) => {
        const [rank = 0] = localRanks.ranks;
        const shards = shardsOf(new Parameters(plan, new RankPrograms(plan), localRanks), rank, checkpoint);
        const loader = localRanks.rankDevice(rank).openLoader?.();
        if (!loader) throw new Error("no loader");
        return loadState(loader, shards).then(
          () => "loaded",
          (error: Error) => error.message,
        );
      }),
    );
    // the embedding is cut along the vocabulary: only ranks with its second half read the damaged part
    expect(ends.filter((end) => end === "loaded")).toHaveLength(2);
    for (const end of ends) expect(end).toMatch(/^loaded$|rank-00000\.safetensors: the SHA-256 of tensor embed differs/);
    await Promise.all(ranks.map((localRanks) => localRanks.close()));
    checkpoint.close();
  });
});

const dimOf = fc.record({ size: fc.integer({ min: 1, max: 6 }), cuts: fc.array(fc.tuple(fc.boolean(), fc.boolean()), { maxLength: 6 }) });
test("pieces and their parts in any range of a file are the elements that two shards share", () => {
  fc.assert(
    fc.property(fc.array(dimOf, { maxLength: 4 }), fc.integer({ min: 1, max: 40 }), (dims, part) => {
      // each shard has the indices that are true for it, as ranges
      const rangesOf = (side: 0 | 1): Ranges =>
        dims.map(({ size, cuts }) =>
          Array.from({ length: size }, (_, i) => i)
            .filter((i) => cuts[i]?.[side] ?? true)
            .map((i) => [i, i + 1] as const)
            .reduce<[number, number][]>((all, [from, to]) => {
              const last = all.at(-1);
              if (last?.[1] === from) last[1] = to;
              else all.push([from, to]);
              return all;
            }, []),
        );
      const [theirs, ours] = [rangesOf(0), rangesOf(1)];
      const [many, few] = [theirs, ours].map((ranges) => elementsOf(lengthsOf(ranges)));
      const shared = sharedBy(theirs, ours);
      if (!shared || !many || !few) return;
      const values = Float32Array.from({ length: many }, (_, i) => i + 1);
      const expected = new Float32Array(few);
      copyShared(shared, [theirs, values], [ours, expected]);
      const found = new Float32Array(few);
      const pieces = sharedPieces(shared, lengthsOf(theirs), lengthsOf(ours));
      for (let from = 0; from < many; from += part)
        for (const cut of pieces.flatMap((piece) => cutPiece(piece, from, from + part)))
          for (let r = 0; r < cut.rows; r++)
            for (let c = 0; c < cut.columns; c++) {
              const at = cut.at + r * cut.stride + c;
              expect(at >= from && at < from + part).toBe(true);
              found[cut.to + r * cut.rowStep + c * cut.columnStep]! += values[at]!;
            }
      expect([...found]).toEqual([...expected]);
    }),
    { numRuns: 100 },
  );
});
