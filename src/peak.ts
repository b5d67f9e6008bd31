/**
 * peak: the memory of every stage without compiling the whole job. Chunks of equal layers have equal memory, so each distinct chunk is
 * compiled once, as a stage of a pipeline of its own; within a chunk a long stretch that repeats some layers is compiled at two lengths,
 * and its memory grows linearly from there. A stage is then the sum of its chunks, with as many copies of their activations as the
 * job's own schedule keeps in flight.
 */
import { expertLayersOf, hasExperts, type Job } from "../schemas/job.ts";
import type { Program } from "../schemas/plan.ts";
import { layerOf } from "./analysis/layerNames.ts";
import { type MemoryBreakdown, memoryKinds } from "./analysis/memoryBreakdown.ts";
import { generateKernels } from "./codegen/generateKernels.ts";
import type { Target } from "./codegen/targets.ts";
import { buildModel } from "./model/model.ts";
import { addBackward } from "./passes/backward.ts";
import { lower } from "./passes/lower.ts";
import { aligned, planMemory } from "./passes/memory.ts";
import { buildMesh, type Mesh } from "./passes/mesh.ts";
import { chunkOfVirtual, headAt, type Pipeline, pipelineOf, stageOfVirtual } from "./passes/pipeline.ts";
import type { Lowered } from "./passes/programBuilder.ts";
import { isRecomputed } from "./passes/recompute.ts";
import { schedule } from "./passes/schedule.ts";
import { shard } from "./passes/shard.ts";

/** Repetitions of a stretch that are compiled: from here on, one more adds the same bytes. */
const KEPT = 3;
/** Layers of a repeating unit at most. */
const UNIT = 16;
/** Stretches of a chunk that are cut, at most. */
const STRETCHES = 2;
/** Layers of all distinct chunks that are compiled; of more, the layers of each chunk are put in the order of their kind. */
const MOST = 192;

/** One position of the model: its letter in a layout, and what tells it apart from others of this letter. */
interface Place {
  readonly letter: "E" | "t" | "m" | "L";
  readonly kind: string;
  readonly experts: boolean;
}

/** A repeated unit of places that was cut to `KEPT` repetitions. */
interface Stretch {
  readonly from: number;
  readonly unit: number;
  readonly removed: number;
}

interface ChunkKind {
  readonly places: readonly Place[];
  readonly stretches: readonly Stretch[];
}

/** The memory of a chunk; `shared` are buffers of a stage that its chunks have in common, by id. */
interface ChunkMemory {
  readonly own: MemoryBreakdown;
  readonly shared: ReadonlyMap<string, { readonly kind: "parameter" | "gradient" | "optimizer"; readonly bytes: number }>;
  /** Inputs among the activations, in bytes: where several chunks of a stage read one, it is workspace, filled for each block. */
  readonly inputs: ReadonlyMap<string, number>;
}

/** The memory of each stage's ranks, as the plan of this target would have it. Bytes. */
export function memoryOfStages(job: Job, target: Target): MemoryBreakdown[] {
  const pipeline = pipelineOf(job);
  const all = chunkPlaces(job, pipeline);
  const exact = kindsOf(job, all);
  const size = exact.kinds.reduce((sum, { places }) => sum + places.length, 0);
  // layers in no order cannot be cut: in order, parameters are the same, and activations but for holes between buffers
  const { virtual, keys, kinds } =
    size > MOST
      ? kindsOf(
          job,
          all.map((places) => inOrder(job, places)),
        )
      : exact;
  const memories = memoryOfKinds(job, kinds, target);
  const byKey = new Map(keys.map((key, k) => [key, memories[k]]));
  return schedule(job, pipeline.chunks).map(({ copies }, stage) =>
    together(
      virtual.flatMap(({ key }, v) => {
        const memory = byKey.get(key);
        return stageOfVirtual(pipeline, v) === stage && memory ? [{ memory, copies: copies[chunkOfVirtual(pipeline, v)] ?? 0 }] : [];
      }),
    ),
  );
}

/** The distinct chunks, cut, and by virtual stage which one it is. */
function kindsOf(job: Job, chunks: readonly (readonly Place[])[]) {
  const virtual = chunks.map((places) => ({ places, key: places.map(({ kind }) => kind).join(" ") }));
  const last = new Map(virtual.map(({ key }, v) => [key, v]));
  // in order of their last use: the embedding stays first, the head last, and the model's last layer the last of the layers
  const keys = [...last.keys()].sort((a, b) => (last.get(a) ?? 0) - (last.get(b) ?? 0));
  return { virtual, keys, kinds: keys.map((key) => cut(job, virtual[last.get(key) ?? 0]?.places ?? [])) };
}

/** A chunk with its dense layers before those with experts. */
function inOrder(job: Job, places: readonly Place[]): Place[] {
  const layers = places.filter(({ letter }) => letter === "t").sort((a, b) => Number(a.experts) - Number(b.experts));
  let at = 0;
  return places.map((place) => {
    const layer = place.letter === "t" ? layers[at++] : undefined;
    return layer ? layerPlace(job, layer.experts, at - 1) : place;
  });
}

/** A layer at a place of its chunk. Full recompute tells layers apart by that: the first of a group, or of the chunk. */
function layerPlace({ train: { recompute: r } }: Job, experts: boolean, at: number): Place {
  const again = r.mode !== "full" ? "" : r.method === "uniform" ? (at % r.layers === 0 ? "b" : "n") : at < r.layers ? "a" : "k";
  return { letter: "t", kind: `${experts ? "x" : "d"}${again}`, experts };
}

function chunkPlaces(job: Job, { of, stages, chunks }: Pipeline): Place[][] {
  const { model } = job;
  const places = Array.from({ length: stages * chunks }, (): Place[] => []);
  for (const [position, v] of of.entries()) {
    const chunk = places[v];
    if (!chunk) continue;
    const layer = position - 1;
    if (position === 0 || position === headAt(model)) {
      const letter = position === 0 ? "E" : "L";
      chunk.push({ letter, kind: letter, experts: false });
    } else if (layer >= model.layers) chunk.push({ letter: "m", kind: `m${layer}`, experts: false });
    else {
      const at = chunk.length - Number(chunk[0]?.letter === "E");
      chunk.push(layerPlace(job, hasExperts(model, layer), at));
    }
  }
  return places;
}

/** Cuts the longest stretches of a chunk that repeat a unit. */
function cut({ train: { recompute: r }, parallel }: Job, all: readonly Place[]): ChunkKind {
  let places = all;
  const stretches: Stretch[] = [];
  const layers = all.filter(({ letter }) => letter === "t").length;
  // what full recompute does with a layer depends on its place in the chunk: what is removed must not move the others
  const grouped = r.mode === "full" && r.layers < layers;
  // with gradients of weights apart, the free places of two layers in a row differ: their arena grows by turns
  const turns = parallel.schedule === "zero_bubble" ? 2 : 1;
  const step = turns * (grouped && r.method === "uniform" ? r.layers : 1);
  const fixed = grouped && r.method === "block" ? "a" : undefined;
  while (stretches.length < STRETCHES) {
    const found = longest(places, step, fixed, stretches);
    if (!found) break;
    stretches.push(found);
    const end = found.from + KEPT * found.unit;
    places = [...places.slice(0, end), ...places.slice(end + found.removed * found.unit)];
  }
  return { places, stretches };
}

/** The repetition whose cut removes the most layers: at `from`, one more than `KEPT` times at least. */
function longest(places: readonly Place[], step: number, fixed: string | undefined, before: readonly Stretch[]): Stretch | undefined {
  let best: Stretch | undefined;
  const taken = (i: number): boolean => before.some((s) => i >= s.from && i < s.from + KEPT * s.unit);
  for (let unit = step; unit <= Math.max(step, UNIT) && unit * (KEPT + 1) < places.length; unit += step) {
    let run = 0;
    for (let i = 0; i + unit < places.length; i++) {
      const [a, b] = [places[i], places[i + unit]];
      const same = a?.letter === "t" && a.kind === b?.kind && !(fixed && a.kind.endsWith(fixed)) && !taken(i) && !taken(i + unit);
      run = same ? run + 1 : 0;
      const removed = Math.floor(run / unit) + 1 - KEPT - 1;
      // the last repetition stays as it is: a stretch of one more than those that are kept has nothing to be cut
      if (removed > 0 && removed * unit > (best ? best.removed * best.unit : 0)) {
        const length = (removed + KEPT + 1) * unit;
        best = { from: i + unit + 1 - length, unit, removed };
      }
    }
  }
  return best;
}

/** Compiles all kinds as the stages of one pipeline, and once more for each stretch, one repetition longer. */
function memoryOfKinds(job: Job, kinds: readonly ChunkKind[], target: Target): ChunkMemory[] {
  const base = compiled(
    job,
    kinds.map(({ places }) => places),
    target,
  );
  const most = Math.max(0, ...kinds.map(({ stretches }) => stretches.length));
  let memories = base;
  for (let n = 0; n < most; n++) {
    const longer = compiled(
      job,
      kinds.map((kind) => lengthened(kind, n)),
      target,
    );
    memories = memories.map(({ own, shared, inputs }, k) => {
      const times = kinds[k]?.stretches[n]?.removed ?? 0;
      const more = (kind: keyof MemoryBreakdown): number => own[kind] + times * ((longer[k]?.own[kind] ?? 0) - (base[k]?.own[kind] ?? 0));
      return { own: eachKind(more), shared, inputs };
    });
  }
  return memories;
}

/** The places of a chunk with one more repetition of its n-th stretch. Later cuts may have moved it. */
function lengthened({ places, stretches }: ChunkKind, n: number): readonly Place[] {
  const stretch = stretches[n];
  if (!stretch) return places;
  const moved = stretches.slice(n + 1).reduce((sum, s) => sum + (s.from < stretch.from ? s.removed * s.unit : 0), 0);
  const from = stretch.from - moved;
  return [...places.slice(0, from + stretch.unit), ...places.slice(from)];
}

function compiled(job: Job, chunks: readonly (readonly Place[])[], target: Target): ChunkMemory[] {
  const all = chunks.flat();
  const layers = all.filter(({ letter }) => letter === "t");
  const { model, parallel } = job;
  const small: Job = {
    ...job,
    model: { ...model, layers: layers.length, moe: model.moe && { ...model.moe, layers: layers.map(({ experts }) => Number(experts)) } },
    parallel: {
      ...parallel,
      world: (parallel.world / parallel.pipeline) * chunks.length,
      pipeline: chunks.length,
      virtual_pipeline: 1,
      layout: chunks.map((places) => places.map(({ letter }) => letter).join("")).join("|"),
    },
  };
  const mesh = buildMesh(small);
  const programs = lowered(small, mesh);
  const made = target.name === "cpu" ? { programs, kernels: [] } : generateKernels(programs, mesh, target);
  return made.programs.map((program) => chunkMemory(program, planMemory(program, made.kernels), expertLayersOf(model)));
}

function chunkMemory(
  { buffers, chunks, inputs: filled }: Program,
  memory: ReturnType<typeof planMemory>,
  expertLayers: number,
): ChunkMemory {
  const shared = new Map<string, { kind: "parameter" | "gradient" | "optimizer"; bytes: number }>();
  const own = { parameter: memory.parameter, gradient: memory.gradient, optimizer: memory.optimizer };
  for (const { id, kind, within, ...b } of buffers) {
    if (within || kind === "activation" || kind === "workspace" || layerOf(id) !== undefined) continue;
    // a stage counts the tokens of experts in a table of all layers of the model, not of those that were compiled
    const shape = id.startsWith("expert_loads") ? [expertLayers, ...b.shape.slice(1)] : b.shape;
    shared.set(id, { kind, bytes: aligned({ ...b, shape }) });
    own[kind] -= aligned(b);
  }
  const activation = chunks.reduce((sum, _, c) => sum + (memory.activation[c] ?? 0), 0);
  const host = new Set(Object.values(filled));
  const inputs = new Map(buffers.flatMap((b) => (b.kind === "activation" && host.has(b.id) ? [[b.id, aligned(b)] as const] : [])));
  return { own: { ...own, activation, workspace: memory.workspace, scratch: memory.scratch }, shared, inputs };
}

/** A stage of several chunks: each has its own layers and activations; workspace and scratch are used by one chunk at a time. */
function together(chunks: readonly { readonly memory: ChunkMemory; readonly copies: number }[]): MemoryBreakdown {
  const shared = new Map(chunks.flatMap(({ memory }) => [...memory.shared]));
  const sum = (of: (c: (typeof chunks)[number]) => number): number => chunks.reduce((n, c) => n + of(c), 0);
  const readers = (id: string): number => sum(({ memory }) => Number(memory.inputs.has(id)));
  /** Bytes of a chunk's inputs that another chunk reads too. */
  const inCommon = ({ inputs }: ChunkMemory): number => [...inputs].reduce((n, [id, bytes]) => n + (readers(id) > 1 ? bytes : 0), 0);
  return eachKind((kind) => {
    if (kind === "scratch") return Math.max(0, ...chunks.map(({ memory }) => memory.own.scratch));
    if (kind === "workspace") return Math.max(0, ...chunks.map(({ memory }) => memory.own.workspace + inCommon(memory)));
    if (kind === "activation") return sum(({ memory, copies }) => copies * (memory.own.activation - inCommon(memory)));
    const common = [...shared.values()].reduce((n, b) => n + (b.kind === kind ? b.bytes : 0), 0);
    return common + sum(({ memory }) => memory.own[kind]);
  });
}

const eachKind = (of: (kind: keyof MemoryBreakdown) => number): MemoryBreakdown =>
  Object.fromEntries(memoryKinds.map((kind) => [kind, of(kind)])) as unknown as MemoryBreakdown;

/** The programs of a job: the passes of `compile`, without its laws. */
function lowered(job: Job, mesh: Mesh): Program[] {
  const pipeline = pipelineOf(job);
  const graph = addBackward(buildModel(job), isRecomputed(job, pipeline));
  const sharded = shard(graph, mesh, {
    distributedOptimizer: job.parallel.distributed_optimizer,
    shares: (f) => mesh.subAxes[f]!.stride < mesh.per_stage / job.parallel.optimizer_instances,
    stageOf: (position) => pipeline.of[position]!,
    roleOf: (virtual) => stageOfVirtual(pipeline, virtual),
  });
  // the order of work says whether gradients of weights are apart; how many microbatches there are changes no memory but slots
  const few: Lowered["order"] = schedule(
    { ...job, train: { ...job.train, batch_rampup: null, global_batch: job.train.micro_batch * job.parallel.data * 2 } },
    pipeline.chunks,
  );
  return lower(job, mesh, { graph, sharded, pipeline, order: few });
}
