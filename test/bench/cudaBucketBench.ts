/**
 * Buckets as one group of NCCL calls, one for each tensor, and as one call over contiguous memory: microseconds of a bucket, in a graph. On a machine
 * with two GPUs:
 *
 *     node --import tsx/esm test/bench/cudaBucketBench.ts [--mib 160] [--rounds 20]
 *
 * A bucket of so many MiB of f32 gradients is reduced and scattered, and one of half as many bytes of bf16 parameters gathered, divided into 1 to 256
 * equal tensors. The ranks are processes.
 */
import { fork } from "node:child_process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { offsetPointer } from "../../runtime/cuda/arenas.ts";
import { type Context, driver, type Stream } from "../../runtime/cuda/driver.ts";
import { type Communicator, joinCommunicator, uniqueId } from "../../runtime/cuda/nccl.ts";

const { values } = parseArgs({ options: { mib: { type: "string", default: "160" }, rounds: { type: "string", default: "20" } } });
const [bytes, rounds] = [Number(values.mib) * 2 ** 20, Number(values.rounds)];
const RANKS = 2;
const counts = [1, 4, 16, 64, 256];

/** Returns the microseconds of a bucket: the median over replays of a graph with several. */
function measure(context: Context, stream: Stream, bucket: () => void): number {
  const EACH = 4;
  bucket();
  context.synchronize(stream);
  context.beginCapture(stream);
  for (let n = 0; n < EACH; n++) bucket();
  const graph = context.endCapture(stream);
  const [began, ended] = [context.createEvent(), context.createEvent()];
  const times = Array.from({ length: rounds }, () => {
    context.record(began, stream);
    context.replay(graph, stream);
    context.record(ended, stream);
    context.synchronize(stream);
    return (1e3 * context.elapsed(began, ended)) / EACH;
  });
  context.destroyGraph(graph);
  for (const event of [began, ended]) context.destroyEvent(event);
  return times.sort((a, b) => a - b)[rounds >> 1] ?? Number.NaN;
}

/** Measures all buckets as one rank. */
function run(rank: number, id: Uint8Array): void {
  const device = driver().devices[rank];
  if (!device) throw new Error(`there is no GPU ${rank}`);
  const context = driver().open(device);
  const stream = context.createStream("urgent");
  const comm: Communicator = joinCommunicator(id, rank, RANKS);
  const [from, to] = [context.alloc(bytes), context.alloc(bytes)];
  context.fill(from, 0, bytes);
  for (const tensors of counts) {
    const own = bytes / 4 / tensors / RANKS;
    const scatter = (n: number): void =>
      comm.reduceScatter(offsetPointer(from, n * own * RANKS * 4), offsetPointer(to, n * own * 4), own, stream, "f32");
    const gather = (n: number): void =>
      comm.allGather(offsetPointer(from, n * own * 2), offsetPointer(to, n * own * RANKS * 2), own, stream, "bf16");
    const group = (call: (n: number) => void): void =>
      tensors === 1
        ? call(0)
        : comm.together(() => {
            for (let n = 0; n < tensors; n++) call(n);
          });
    const [scattered, gathered] = [scatter, gather].map((call) => measure(context, stream, () => group(call)));
    if (rank === 0) console.log(`| ${tensors} | ${scattered?.toFixed(1)} | ${gathered?.toFixed(1)} |`);
  }
  comm.close();
}

if (process.send)
  process.once("message", ({ rank, id }: { rank: number; id: number[] }) => {
    run(rank, Uint8Array.from(id));
    process.exit(0);
  });
else {
  const id = [...uniqueId()];
  console.log(
    `| tensors of a bucket | reduce-scatter of ${values.mib} MiB, us | all-gather of ${Number(values.mib) / 2} MiB, us |\n|---|---|---|`,
  );
  for (let rank = 0; rank < RANKS; rank++) {
    const child = fork(fileURLToPath(import.meta.url), process.argv.slice(2), { execArgv: process.execArgv });
    child.send({ rank, id });
    child.once("exit", (code) => {
      process.exitCode ||= code ?? 1;
    });
  }
}
