/**
 * The memory of every stage, without compiling the whole job. Chunks with equal layers have equal memory, so each distinct chunk is
 * compiled once, as a stage of a pipeline of distinct chunks. A long repetition of layers within a chunk is compiled at two lengths and
 * extrapolated linearly. The memory of a stage is the sum of its chunks, with the activation copies of the job's schedule.
 */

import { writesOf } from "../schemas/effects.ts";
import { expertLayersOf, hasExperts } from "../schemas/experts.ts";
import type { Job } from "../schemas/job.ts";
import type { Memory, Program } from "../schemas/plan.ts";
import { instructionsOf } from "../schemas/program.ts";
import { type MemoryBreakdown, memoryBreakdown, memoryKinds } from "./analysis/memoryBreakdown.ts";
import { generateKernels } from "./codegen/generateKernels.ts";
import { type Fusion, fusionsOf } from "./codegen/targetNames.ts";
import type { Target } from "./codegen/targets.ts";
import { headAt } from "./model/positions.ts";
import { fuseFor, joinFor } from "./passes/fuse.ts";
import { lower } from "./passes/lower.ts";
import { aligned, forwardWorkspace, planMemory, scratchBound } from "./passes/memory.ts";
import { buildMesh, type Mesh } from "./passes/mesh.ts";
import { overlap } from "./passes/overlap.ts";
import { chunkOfVirtual, type Pipeline, pipelineOf, runsInPairs, stageOfVirtual } from "./passes/pipelineStages.ts";
import type { Lowered } from "./passes/programBuilder.ts";
import { schedule } from "./passes/schedule.ts";
import { shardJob } from "./passes/shardJob.ts";

/** Compiled repetitions of a stretch. Each further repetition adds the same bytes. */
const KEPT = 3;
/** The largest number of layers of a repeating unit. */
const UNIT = 16;
/** The largest number of stretches that are shortened per chunk. */
const STRETCHES = 2;
/** The largest number of compiled positions. Beyond it, the layers of each chunk are sorted by kind. */
const MOST = 192;

/** One position of the model: its letter in a layout, and the kind that distinguishes positions of one letter. */
interface ModelPosition {
  readonly letter: "E" | "t" | "m" | "L";
  readonly kind: string;
  readonly experts: boolean;
}

/** A repeated unit of positions that was shortened to `KEPT` + 1 repetitions. */
interface Stretch {
  readonly from: number;
  readonly unit: number;
  readonly removed: number;
}

/** A distinct chunk, shortened, with the stretches that were shortened. */
interface ChunkKind {
  readonly whole: readonly ModelPosition[];
  readonly places: readonly ModelPosition[];
  readonly stretches: readonly Stretch[];
}

/** The memory of a chunk. `shared` are the buffers that the chunks of a stage share, by id. */
interface ChunkMemory {
  readonly own: MemoryBreakdown;
  /** With pairs, the bytes of workspace that forwards have beside that of others; it is no part of `own`. */
  readonly forward: number;
  readonly shared: ReadonlyMap<string, { readonly kind: "parameter" | "gradient" | "optimizer"; readonly bytes: number }>;
  /** Bytes of inputs that are activations here. If several chunks of a stage read one, it is workspace instead. */
  readonly inputs: ReadonlyMap<string, number>;
}

/** What of a target the memory depends on. */
interface KernelMemory {
  readonly fuses?: readonly Fusion[];
  /** Returns the programs as the plan has them, with their memory. */
  readonly plan: (programs: Program[], mesh: Mesh) => readonly { readonly program: Program; readonly memory: Memory }[];
}

/** Returns the memory breakdown of a rank of each stage, in bytes, as the plan for `target` would state it. */
export const memoryOfStages = (job: Job, target: Target): MemoryBreakdown[] =>
  stagesWith(job, {
    ...target,
    plan: (lowered, mesh) => {
      const { programs, kernels } = target.name === "cpu" ? { programs: lowered, kernels: [] } : generateKernels(lowered, mesh, target);
      return programs.map((program) => ({ program, memory: planMemory(program, kernels) }));
    },
  });

/**
 * Returns an upper bound of the memory breakdown of a rank of each stage, in bytes, for a target that is not loaded. The scratch is a bound, all other
 * parts are exact. To generate the kernels takes a tenth of a check.
 */
export const memoryBoundOfStages = (job: Job, target: string): MemoryBreakdown[] =>
  stagesWith(job, {
    fuses: fusionsOf(target),
    plan: (programs) =>
      programs.map((program) => ({ program, memory: { ...planMemory(program), scratch: target === "cpu" ? 0 : scratchBound(program) } })),
  });

function stagesWith(job: Job, target: KernelMemory): MemoryBreakdown[] {
  const pipeline = pipelineOf(job);
  const all = chunkPositions(job, pipeline);
  const exact = kindsOf(job, all);
  const size = exact.kinds.reduce((sum, { places }) => sum + places.length, 0);
  // unsorted layers have no repetitions to shorten; sorting keeps parameters, and activations up to gaps between buffers
  const { virtual, keys, kinds } =
    size > MOST
      ? kindsOf(
          job,
          all.map((places) => sortLayers(job, places)),
        )
      : exact;
  const memories = memoryOfKinds(job, kinds, target);
  const byKey = new Map(keys.map((key, k) => [key, memories[k]]));
  return schedule(job, pipeline.chunks).map(({ order, copies }, stage) =>
    combineChunks(
      order.some(({ paired }) => paired),
      virtual.flatMap(({ key }, v) => {
        const memory = byKey.get(key);
        return stageOfVirtual(pipeline, v) === stage && memory ? [{ memory, copies: copies[chunkOfVirtual(pipeline, v)] ?? 0 }] : [];
      }),
    ),
  );
}

/** Returns the distinct chunks, shortened, and the key of each virtual stage. */
function kindsOf(job: Job, chunks: readonly (readonly ModelPosition[])[]) {
  const virtual = chunks.map((places) => ({ places, key: places.map(({ kind }) => kind).join(" ") }));
  const last = new Map(virtual.map(({ key }, v) => [key, v]));
  // sorted by last use: the embedding stays first, the head last, and the last layer of the model stays the last layer
  const keys = [...last.keys()].sort((a, b) => (last.get(a) ?? 0) - (last.get(b) ?? 0));
  return { virtual, keys, kinds: keys.map((key) => shorten(job, virtual[last.get(key) ?? 0]?.places ?? [])) };
}

/** Returns a chunk with its dense layers before those with experts. */
function sortLayers(job: Job, places: readonly ModelPosition[]): ModelPosition[] {
  const layers = places.filter(({ letter }) => letter === "t").sort((a, b) => Number(a.experts) - Number(b.experts));
  let at = 0;
  return places.map((place) => {
    const layer = place.letter === "t" ? layers[at++] : undefined;
    return layer ? layerPosition(job, layer.experts, at - 1) : place;
  });
}

/** Returns a layer at an index of its chunk. The kind depends on the index under full recompute: first of a group, or of the chunk. */
function layerPosition({ train: { recompute: r } }: Job, experts: boolean, at: number): ModelPosition {
  const again = r.mode !== "full" ? "" : r.method === "uniform" ? (at % r.layers === 0 ? "b" : "n") : at < r.layers ? "a" : "k";
  return { letter: "t", kind: `${experts ? "x" : "d"}${again}`, experts };
}

/** Returns the kinds of the positions of each virtual stage: virtual stages with equal kinds have equal instructions, apart from names. */
export const chunkKinds = (job: Job, pipeline: Pipeline): string[] =>
  chunkPositions(job, pipeline).map((places) => places.map(({ kind }) => kind).join(" "));

/** Returns the positions of each virtual stage. */
function chunkPositions(job: Job, { of, stages, chunks }: Pipeline): ModelPosition[][] {
  const { model } = job;
  const places = Array.from({ length: stages * chunks }, (): ModelPosition[] => []);
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
      chunk.push(layerPosition(job, hasExperts(model, layer), at));
    }
  }
  return places;
}

/** Shortens the longest repetitions of a chunk. */
function shorten({ train: { recompute: r }, parallel }: Job, all: readonly ModelPosition[]): ChunkKind {
  let places = all;
  const stretches: Stretch[] = [];
  const layers = all.filter(({ letter }) => letter === "t").length;
  // full recompute depends on the index of a layer in its chunk, so removed layers must not change that of the others
  const grouped = r.mode === "full" && r.layers < layers;
  // with split backward, free holes alternate between layers, so the arena grows with a period of two layers
  const period = parallel.schedule === "zero_bubble" ? 2 : 1;
  const step = period * (grouped && r.method === "uniform" ? r.layers : 1);
  const fixed = grouped && r.method === "block" ? "a" : undefined;
  while (stretches.length < STRETCHES) {
    const found = longest(places, step, fixed, stretches);
    if (!found) break;
    stretches.push(found);
    const end = found.from + KEPT * found.unit;
    places = [...places.slice(0, end), ...places.slice(end + found.removed * found.unit)];
  }
  return { whole: all, places, stretches };
}

/** Returns the repetition that removes the most layers; it has more than `KEPT` + 1 repetitions. */
function longest(
  places: readonly ModelPosition[],
  step: number,
  fixed: string | undefined,
  before: readonly Stretch[],
): Stretch | undefined {
  let best: Stretch | undefined;
  const taken = (i: number): boolean => before.some((s) => i >= s.from && i < s.from + KEPT * s.unit);
  for (let unit = step; unit <= Math.max(step, UNIT) && unit * (KEPT + 1) < places.length; unit += step) {
    let run = 0;
    for (let i = 0; i + unit < places.length; i++) {
      const [a, b] = [places[i], places[i + unit]];
      const same = a?.letter === "t" && a.kind === b?.kind && !(fixed && a.kind.endsWith(fixed)) && !taken(i) && !taken(i + unit);
      run = same ? run + 1 : 0;
      const removed = Math.floor(run / unit) + 1 - KEPT - 1;
      // the last repetition always stays, so KEPT + 1 repetitions have nothing to remove
      if (removed > 0 && removed * unit > (best ? best.removed * best.unit : 0)) {
        const length = (removed + KEPT + 1) * unit;
        best = { from: i + unit + 1 - length, unit, removed };
      }
    }
  }
  return best;
}

/**
 * Compiles all distinct chunks as the stages of one pipeline, and once more per stretch with one repetition more. Free holes of a workspace may fit
 * buffers of some lengths only, so a workspace that grows by a repetition is compiled with two more as well: if it does not grow evenly, whole chunks
 * are compiled.
 */
function memoryOfKinds(job: Job, kinds: readonly ChunkKind[], target: KernelMemory): ChunkMemory[] {
  const base = compiled(
    job,
    kinds.map(({ places }) => places),
    target,
  );
  const most = Math.max(0, ...kinds.map(({ stretches }) => stretches.length));
  let memories = base;
  for (let n = 0; n < most; n++) {
    const [longer, isEven] = longerBy(job, kinds, n, base, target);
    if (!isEven) {
      const whole = kinds.map((kind) => kind.whole);
      return compiled(job, whole, target);
    }
    memories = memories.map(({ own, forward, shared, inputs }, k) => {
      const times = kinds[k]?.stretches[n]?.removed ?? 0;
      const more = (kind: keyof MemoryBreakdown): number => own[kind] + times * ((longer[k]?.own[kind] ?? 0) - (base[k]?.own[kind] ?? 0));
      return { own: eachKind(more), forward: forward + times * ((longer[k]?.forward ?? 0) - (base[k]?.forward ?? 0)), shared, inputs };
    });
  }
  return memories;
}

/** Compiles chunks with one more repetition of their n-th stretches. Returns their memory, and whether workspaces grow evenly. */
function longerBy(job: Job, kinds: readonly ChunkKind[], n: number, base: readonly ChunkMemory[], target: KernelMemory) {
  const withMore = (count: number): ChunkMemory[] =>
    compiled(
      job,
      kinds.map((kind) => lengthened(kind, n, count)),
      target,
    );
  const longer = withMore(1);
  const growth = (before: readonly ChunkMemory[], after: readonly ChunkMemory[]): string =>
    after.map(({ own, forward }, k) => `${own.workspace - (before[k]?.own.workspace ?? 0)} ${forward - (before[k]?.forward ?? 0)}`).join();
  const grown = growth(base, longer);
  const isEven = grown === growth(base, base) || grown === growth(longer, withMore(2));
  return [longer, isEven] as const;
}

/** Returns the positions of a chunk with `more` repetitions of its n-th stretch. Later removals may have moved the stretch. */
function lengthened({ places, stretches }: ChunkKind, n: number, more: number): readonly ModelPosition[] {
  const stretch = stretches[n];
  if (!stretch) return places;
  const moved = stretches.slice(n + 1).reduce((sum, s) => sum + (s.from < stretch.from ? s.removed * s.unit : 0), 0);
  const from = stretch.from - moved;
  const unit = places.slice(from, from + stretch.unit);
  return [...places.slice(0, from), ...Array.from({ length: more }, () => unit).flat(), ...places.slice(from)];
}

/** Compiles chunks as the stages of one pipeline and returns their memory. */
function compiled(job: Job, chunks: readonly (readonly ModelPosition[])[], target: KernelMemory): ChunkMemory[] {
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
  const programs = joinFor(target, overlap(small, mesh, fuseFor(target, lowered(small, mesh))));
  return target.plan(programs, mesh).map(({ program, memory }) => chunkMemory(program, memory, expertLayersOf(model)));
}

/** Splits the memory of a compiled stage into its own part and the part that chunks of one stage share. */
function chunkMemory(program: Program, memory: Memory, expertLayers: number): ChunkMemory {
  const { buffers, inputs: filled } = program;
  const shared = new Map<string, { kind: "parameter" | "gradient" | "optimizer"; bytes: number }>();
  const own = { ...memoryBreakdown(program, memory) };
  const loadTables = expertLoadTables(program);
  for (const { id, kind, within, layer, ...b } of buffers) {
    if (within || kind === "activation" || kind === "workspace" || layer !== undefined) continue;
    // the table of expert loads has a row for every expert layer of the model, not only for the compiled ones
    const shape = loadTables.has(id) ? [expertLayers, ...b.shape.slice(1)] : b.shape;
    shared.set(id, { kind, bytes: aligned({ ...b, shape }) });
    own[kind] -= aligned(b);
  }
  own.activation = memory.activation.reduce((sum, bytes) => sum + bytes, 0);
  const forward = program.pairs ? forwardWorkspace(program, memory) : 0;
  own.workspace -= forward;
  const host = new Set(filled.map(({ buffer }) => buffer));
  const inputs = new Map(buffers.flatMap((b) => (b.kind === "activation" && host.has(b.id) ? [[b.id, aligned(b)] as const] : [])));
  return { own, forward, shared, inputs };
}

/** Returns the tables of expert loads: those that the op adds to, and those that a step reduces them to. */
function expertLoadTables(program: Program): Set<string> {
  const tables = new Set<string>();
  const known = new Map(program.buffers.map((b) => [b.id, b]));
  for (const i of instructionsOf(program))
    if ((i.kind === "compute" && i.op === "expert_loads") || (i.kind === "collective" && tables.has(i.from)))
      for (const id of writesOf(i, known)) tables.add(id);
  return tables;
}

/**
 * Returns the memory of a stage with several chunks. Parameters and activations add up; workspace and scratch are the maximum. With pairs the
 * workspace of a forward is beside that of a backward.
 */
function combineChunks(hasPairs: boolean, chunks: readonly { readonly memory: ChunkMemory; readonly copies: number }[]): MemoryBreakdown {
  const shared = new Map(chunks.flatMap(({ memory }) => [...memory.shared]));
  const sum = (of: (c: (typeof chunks)[number]) => number): number => chunks.reduce((n, c) => n + of(c), 0);
  const readers = (id: string): number => sum(({ memory }) => Number(memory.inputs.has(id)));
  /** Returns the bytes of a chunk's inputs that another chunk reads too. */
  const inCommon = ({ inputs }: ChunkMemory): number => [...inputs].reduce((n, [id, bytes]) => n + (readers(id) > 1 ? bytes : 0), 0);
  return eachKind((kind) => {
    if (kind === "scratch") return Math.max(0, ...chunks.map(({ memory }) => memory.own.scratch));
    if (kind === "workspace") {
      // the blocks of a pair have inputs of their own
      const most = (of: (memory: ChunkMemory) => number): number =>
        Math.max(0, ...chunks.map(({ memory }) => of(memory) + inCommon(memory)));
      const [forward, others] = [most((m) => m.forward), most((m) => m.own.workspace)];
      return hasPairs ? forward + others : Math.max(forward, others);
    }
    if (kind === "activation") return sum(({ memory, copies }) => copies * (memory.own.activation - inCommon(memory)));
    const common = [...shared.values()].reduce((n, b) => n + (b.kind === kind ? b.bytes : 0), 0);
    return common + sum(({ memory }) => memory.own[kind]);
  });
}

const eachKind = (of: (kind: keyof MemoryBreakdown) => number): MemoryBreakdown =>
  Object.fromEntries(memoryKinds.map((kind) => [kind, of(kind)])) as unknown as MemoryBreakdown;

/** Returns the programs of a job: the passes of `compile` without verification. */
function lowered(job: Job, mesh: Mesh): Program[] {
  const sharded = shardJob(job, mesh);
  // two microbatches suffice, and where there are pairs two for each stage more: the schedule decides whether backward is split or paired, their number only the activation copies
  const microbatches = 2 + (runsInPairs(job) ? 2 * job.parallel.pipeline : 0);
  const few: Lowered["order"] = schedule(
    { ...job, train: { ...job.train, batch_rampup: null, global_batch: job.train.micro_batch * job.parallel.data * microbatches } },
    sharded.pipeline.chunks,
  );
  return lower(job, mesh, { ...sharded, order: few });
}
