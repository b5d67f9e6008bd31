/** Steps of a plan on any fleets, with inputs and first weights made up: what runs of one plan on two devices are compared by. */
import type { BlockPosition, HostData, LocalRanks } from "../../runtime/backend.ts";
import type { CudaRanks } from "../../runtime/cuda/backend.ts";
import { shardOf, shardRanges } from "../../runtime/shards.ts";
import { trainingSchedule } from "../../runtime/train/stepParameters.ts";
import { readsOf } from "../../schemas/effects.ts";
import type { Buffer, BufferKind, HostInput, Instruction, Plan } from "../../schemas/plan.ts";
import { blockTag, microbatchesIn, orderOf, runsIn } from "../../schemas/program.ts";
import { elementsOf, numberInStage, stageOfRank } from "../../schemas/sharding.ts";
import { random } from "./opCases.ts";

type Feed = (b: Buffer, input: HostInput, m: number) => HostData;

/** One step of all ranks, of so many microbatches, as runtime/train/loop.ts walks a plan. Which fleets replayed it. */
export async function stepTogether(
  fleets: readonly LocalRanks[],
  plan: Plan,
  feed: Feed,
  microbatches = microbatchesIn(plan.programs[0]!),
): Promise<boolean[]> {
  const replayed = fleets.map((f) => (f as Partial<CudaRanks>).beginStep?.(microbatches) ?? false);
  const walks = fleets.flatMap((f) => f.ranks.map((r) => walk(f, plan, r, feed, microbatches)));
  for (let left = walks; left.length; ) left = left.filter((w) => !w.next().done);
  await Promise.all(fleets.map((f) => f.finish()));
  return replayed;
}

export async function closeAll(fleets: readonly LocalRanks[]): Promise<void> {
  for (const f of fleets) await f.close();
}

/** Metrics that count tokens. In 16-bit floats a near tie sends a token to another expert, which changes a count by a whole number. */
const isCount = (name: string): boolean => name === "expert_loads" || name === "dropped_rows";

/**
 * Trains some steps. Returns what each rank holds afterwards (parameters, gradients, optimizer state) and, for each step, the losses and
 * norms, the counts of tokens, and whether the step was skipped.
 */
export async function train(fleets: readonly LocalRanks[], plan: Plan, step = stepTogether, steps = 4) {
  const schedule = trainingSchedule(plan.job);
  const skipped: boolean[] = [];
  for (const f of fleets)
    for (const r of f.ranks) {
      const p = plan.programs[stageOfRank(plan.mesh, r)]!;
      for (const q of p.parameters) {
        const next = random(q.name.length * 31 + q.init.std);
        let whole: Float32Array | undefined;
        for (const id of new Set([q.buffer, q.master])) {
          const b = p.buffers.find((x) => x.id === id)!;
          whole ??= Float32Array.from({ length: elementsOf(b.sizes) }, () => next() * 0.3 + (q.init.type === "ones" ? 1 : 0));
          f.rankDevice(r).write(b, 0, shardOf(whole, b, shardRanges(plan.mesh, b, numberInStage(plan.mesh, r))));
        }
      }
    }
  const replayed: boolean[][] = [];
  const metrics: number[][] = [];
  const counts: number[][] = [];
  const named = ({ metrics: all }: Plan["programs"][number], has: (name: string) => boolean) =>
    Object.entries(all).flatMap(([name, ids]) => (has(name) ? ids : []));
  const each = async (gather: (p: Plan["programs"][number]) => readonly string[]) => {
    const found: HostData[] = [];
    for (const f of fleets)
      for (const r of f.ranks) {
        const p = plan.programs[stageOfRank(plan.mesh, r)]!;
        for (const id of gather(p)) found.push(await f.rankDevice(r).read(p.buffers.find((b) => b.id === id)!, 0));
      }
    return found;
  };
  for (let n = 1; n <= steps; n++) {
    const { lossScale, upscale, weightDecay, update, microbatches } = schedule.next();
    const attributes: Readonly<Record<string, number>> = {
      ...{
        one: lossScale * upscale,
        lr: 0.01 / n,
        step: update,
        weight_decay: weightDecay,
        loss_scale: lossScale,
        mtp_coeff: lossScale * upscale * 0.3,
      },
    };
    const next = random(n);
    const whole = Array.from({ length: 64 }, () => Int32Array.from({ length: 64 }, () => Math.floor((next() + 1) * 127.9)));
    const feed = (b: Buffer, input: HostInput, m: number): HostData => {
      const { source } = input;
      if (source === "ids" || source === "labels") return whole[2 * m + Number(source === "labels")]!.slice(0, elementsOf(b.shape));
      if (source === "weights") return new Float32Array(elementsOf(b.shape)).fill(1 / elementsOf(b.shape) / microbatches);
      if (source === "sample") return Int32Array.from({ length: elementsOf(b.shape) }, (_, i) => 100 * n + 10 * m + i);
      return Float32Array.of(attributes[source]!);
    };
    replayed.push(await step(fleets, plan, feed, microbatches));
    metrics.push((await each((p) => named(p, (name) => !isCount(name)))).map((m) => m[0]!));
    counts.push((await each((p) => named(p, isCount))).flatMap((m) => [...m]));
    skipped.push((await each((p) => p.metrics.grad_norm!)).some((m) => !Number.isFinite(m[0]!)));
    schedule.done(skipped.at(-1) ? "overflowed" : "updated");
  }
  const state = await each((p) => p.parameters.flatMap((q) => [...new Set([q.buffer, q.master, q.gradient])]));
  return { metrics, counts, state, replayed, skipped };
}

function* walk(localRanks: LocalRanks, plan: Plan, r: number, feed: Feed, microbatches: number): Generator<undefined> {
  const p = plan.programs[stageOfRank(plan.mesh, r)]!;
  const backend = localRanks.rankDevice(r);
  const buffers = new Map(p.buffers.map((b) => [b.id, b]));
  function* block(instructions: readonly Instruction[], kinds: readonly BufferKind[], at: BlockPosition): Generator<undefined> {
    const { copy, microbatch } = at;
    const used = new Set(instructions.flatMap(readsOf));
    for (const input of p.inputs) {
      const b = buffers.get(input.buffer)!;
      if (used.has(b.id) && kinds.includes(b.kind)) backend.write(b, copy, feed(b, input, Math.max(0, microbatch)));
    }
    for (const i of instructions) {
      if (!runsIn(i, { first: microbatch === 0, last: microbatch === microbatches - 1, logged: true })) continue;
      for (const id of i.waits ?? []) while (!localRanks.comm.wait(r, id)) yield;
      if (i.kind === "compute") backend.compute(i, copy, microbatch === 0);
      else if (i.kind === "collective") while (!localRanks.comm.collective(r, i, at)) yield;
      else if (i.kind === "send") localRanks.comm.send(r, i, at);
      else while (!localRanks.comm.recv(r, i, at)) yield;
    }
  }
  backend.zeroGradients();
  for (const run of orderOf(p, microbatches)) {
    const { kind, microbatch, chunk } = run;
    const tag = blockTag(run, p.chunks.length);
    const { copies, [kind]: instructions } = p.chunks[chunk]!;
    const kinds: BufferKind[] = kind === "forward" ? ["workspace", "activation"] : ["workspace"];
    yield* block(instructions, kinds, { tag, microbatch, copy: microbatch % copies });
  }
  yield* block(p.step, ["optimizer"], { tag: "step", microbatch: -1, copy: 0 });
  while (!localRanks.comm.wait(r)) yield;
}
