/** Why an instruction or a buffer exists: the job key, the sharding decision, bytes and links, what it costs, and what would remove it. */

import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { devices } from "../../schemas/devices.ts";
import { bytesOf } from "../../schemas/dtypes.ts";
import { readsOf } from "../../schemas/effects.ts";
import type { BlockRun, Buffer, Collective, Instruction, Plan, Program } from "../../schemas/plan.ts";
import { type Block, blocksOf, groupsOf, instructionsOf, timesIn } from "../../schemas/program.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { membersOf } from "../../schemas/tensorLists.ts";
import { type BufferTable, buffersOf } from "../analysis/bufferTable.ts";
import { costOf } from "../analysis/cost.ts";
import { blockTimer, type TimedBlock } from "../analysis/estimate/timedBlocks.ts";
import { layerOf } from "../analysis/layerNames.ts";
import { anyLayer } from "../analysis/layerText.ts";
import { stagesOf } from "../analysis/stages.ts";
import { axesName } from "../passes/mesh.ts";
import type { FoundId, PlacedInstruction } from "./findId.ts";
import { INSPECT_VERSION } from "./inspect.ts";
import { type Link, linksOf, transferAcross } from "./links.ts";
import { moreTensors, shapeText } from "./programText.ts";
import { type Cure, curesOf, keyOfBuffer, keyOfCompute } from "./whyKeys.ts";

/** The answer to `--why`. */
export interface Why {
  readonly format_version: typeof INSPECT_VERSION;
  readonly id: string;
  readonly is: "collective" | "transfer" | "instruction" | "buffer";
  /** In words: `all_gather over tp`. */
  readonly what: string;
  readonly phase?: Block["kind"];
  readonly stages: readonly number[];
  /** The layers with an equal one. */
  readonly layers: readonly number[];
  /** Why it is necessary, a sentence each. */
  readonly because: readonly string[];
  /** The job key that decided it, and its value. */
  readonly key: { readonly path: string; readonly value: unknown };
  /** Layouts, as `Shard(1, tp) -> Replicate`. */
  readonly sharding?: string;
  readonly shapes?: string;
  readonly link?: Link;
  /** Bytes that a rank sends, or that it holds. */
  readonly bytes: number;
  readonly times_per_step: number;
  /** Of all equal ones on a rank of the first stage that has it. */
  readonly bytes_per_step: number;
  readonly flops?: number;
  /** The least seconds of a step for the bytes of all equal ones, at the bandwidth of the links; absent where a device has no links. */
  readonly seconds_per_step?: number;
  /** The estimated seconds of a step for all equal ones on a rank, alone; absent without a device profile. */
  readonly estimated_seconds_per_step?: number;
  /** The share of all bytes that a rank of the stage sends in a step, or of its peak. */
  readonly share: number;
  /** Changes of the job without which it would not exist, or not in this form. */
  readonly removed_by: readonly Cure[];
}

/** Answers why what was found exists. An id of an instruction and of a buffer means the instruction. */
export function explainId(plan: Plan, found: FoundId, profile?: DeviceProfile): Why {
  const { id, alike } = found;
  const [first] = found.instructions;
  const layers = [...new Set(alike.flatMap(({ layer }) => layer ?? []))].sort((a, b) => a - b);
  const common = { format_version: INSPECT_VERSION, id, layers } as const;
  if (!first) {
    const [held] = found.buffers;
    // findId returns an instruction or a buffer
    if (!held) throw new Error(`${id} is neither an instruction nor a buffer`);
    return { ...common, stages: found.buffers.map(({ program }) => program.stage), ...bufferWhy(plan, held.program, held.buffer, alike) };
  }
  const stages = [...new Set(found.instructions.map(({ program }) => program.stage))];
  const { kind } = first.instruction;
  const rest = kind === "compute" ? computeWhy(plan, first) : sendWhy(plan, first);
  const time = profile && !first.block.kind.startsWith("evaluation") ? { estimated_seconds_per_step: timeOf(plan, first, profile) } : {};
  return { ...common, stages, phase: first.block.kind, ...rest, ...time };
}

/** Returns the estimated seconds of a step for the instructions of a stage that are equal in all layers. */
function timeOf(plan: Plan, { program, instruction }: PlacedInstruction, profile: DeviceProfile): number {
  const stage = stagesOf(plan).find((s) => s.program === program);
  if (!stage) return 0;
  const buffers = buffersOf(program);
  const formOf = (i: Instruction): string => `${i.kind} ${anyLayer(i.id, layerOf(i, buffers))}`;
  const form = formOf(instruction);
  const sum = (block: TimedBlock): number =>
    block.instructions.reduce(
      (all, { instruction: i, seconds }) => all + (formOf(i) === form ? seconds * timesIn(program, block, i) : 0),
      0,
    );
  const blocks = blockTimer(plan, { profile, imbalance: 1 })(stage.program, stage.memory).filter(
    ({ isFirst }) => isFirst === (instruction.only === "first"),
  );
  // the block of the last microbatch has all instructions, and stands before that of the others
  return blocks
    .filter((block) => blocks.find(({ kind, chunk }) => kind === block.kind && chunk === block.chunk) === block)
    .reduce((all, block) => all + sum(block), 0);
}

type Rest = Omit<Why, "format_version" | "id" | "layers" | "stages" | "phase">;

const timesOf = ({ program, block, instruction }: PlacedInstruction): number => timesIn(program, block, instruction);

/** Returns the text of a layout: `Shard(dim, axes)` per sharded dim, `Partial(axes)`, or `Replicate`. */
function layoutText({ mesh }: Plan, { shardedBy, partial = [], ragged }: Buffer): string {
  const name = (fs: readonly number[]): string => axesName(mesh, fs, ragged > 0);
  const parts = [
    ...shardedBy.flatMap((fs, dim) => (fs.length > 0 ? [`Shard(${dim}, ${name(fs)})`] : [])),
    ...(partial.length > 0 ? [`Partial(${name(partial)})`] : []),
  ];
  return parts.length > 0 ? parts.join(" ") : "Replicate";
}

/** What answers about a program have in common: made once, because a page asks about every collective. */
interface ProgramFacts {
  readonly buffers: BufferTable;
  /** Bytes that a rank of the stage sends in a step. */
  readonly sent: number;
  /** How many instructions have a kind and an id in any layer. */
  readonly alike: ReadonlyMap<string, number>;
}

const factsByProgram = new WeakMap<Program, ProgramFacts>();

function factsOf(program: Program): ProgramFacts {
  const known = factsByProgram.get(program);
  if (known) return known;
  const buffers = buffersOf(program);
  const alike = new Map<string, number>();
  for (const i of instructionsOf(program)) {
    const form = `${i.kind} ${anyLayer(i.id, layerOf(i, buffers))}`;
    alike.set(form, (alike.get(form) ?? 0) + 1);
  }
  const facts = { buffers, sent: sentBy(program), alike };
  factsByProgram.set(program, facts);
  return facts;
}

const sentBy = (program: Program): number =>
  blocksOf(program).reduce(
    (sum, block) =>
      sum +
      block.instructions.reduce((n, i) => n + (i.kind === "collective" || i.kind === "send" ? i.bytes * timesIn(program, block, i) : 0), 0),
    0,
  );

function sendWhy(plan: Plan, placed: PlacedInstruction): Rest {
  const { program, instruction } = placed;
  if (instruction.kind === "compute") throw new Error(`${instruction.id} sends nothing`);
  const { mesh, job } = plan;
  const { buffers, sent, alike } = factsOf(program);
  const { why, bytes } = instruction;
  const isCollective = instruction.kind === "collective";
  const across = isCollective ? undefined : transferAcross(mesh, program.stage, instruction.peer);
  const link: Link = isCollective ? linksOf(mesh, program.stage)(instruction) : { ranks: 2, nodes: across ? 2 : 1, across: across ?? 0 };
  const times = timesOf(placed);
  const equal = alike.get(`${instruction.kind} ${anyLayer(instruction.id, layerOf(instruction, buffers))}`) ?? 1;
  const total = bytes * times * equal;
  const { links } = devices[job.cluster.device];
  const [from, to] = isCollective
    ? [buffers.get(instruction.from), buffers.get(instruction.to)]
    : [buffers.get(instruction.buffer), undefined];
  return {
    is: isCollective ? "collective" : "transfer",
    what: isCollective
      ? `${instruction.name}${instruction.name === instruction.how ? "" : ` (${instruction.how})`} over ${instruction.axes}`
      : `${instruction.kind} ${instruction.kind === "send" ? "to" : "from"} stage ${instruction.peer}`,
    because: [...becauseOf(instruction), ...besideText(placed)],
    key: { path: why.path, value: keyValue(plan, why.path) },
    ...shardingOf(layoutText(plan, from), to && layoutText(plan, to)),
    shapes: `${from.dtype} ${shapeText(from)}${to ? ` -> ${shapeText(to)}` : ""}`,
    link,
    bytes,
    times_per_step: times,
    bytes_per_step: total,
    ...(links && { seconds_per_step: (total * (1 - link.across)) / links.host + (total * link.across) / links.network }),
    share: total / Math.max(1, sent),
    removed_by: curesOf(plan.job, instruction),
  };
}

/** Says what runs beside an asynchronous collective of a block that runs in pairs. */
function besideText({ program, block, instruction }: PlacedInstruction): string[] {
  if (instruction.kind !== "collective" || !instruction.stream) return [];
  const isHere = (run: BlockRun): boolean => run.kind === block.kind && run.chunk === block.chunk;
  const runs = groupsOf(program.order).filter((group) => group.some(isHere));
  const paired = runs.filter((group) => group.length > 1).length;
  if (paired === 0) return [];
  const other = block.kind === "forward" ? "the backward of an earlier microbatch" : "the forward of a later microbatch";
  return [`it runs beside ${other} in ${paired} of ${runs.length} block runs of a step (parallel.expert_overlap)`];
}

/** Lists of rows are exchanged as plain buffers: their layout does not change. */
const shardingOf = (from: string, to: string | undefined): Pick<Why, "sharding"> =>
  to === undefined ? { sharding: from } : from === to ? {} : { sharding: `${from} -> ${to}` };

/** Says in words what a reshard changes. */
function becauseOf({ why, ...i }: Collective | Extract<PlacedInstruction["instruction"], { kind: "send" | "recv" }>): string[] {
  const use = `${why.op} needs it: ${why.because}`;
  if (i.kind !== "collective") return [use];
  const words: Readonly<Record<Collective["how"], string>> = {
    all_gather: "each rank has a shard, and the use needs the whole dim",
    reduce_scatter: "each rank has an addend of the sum, and the use needs one shard of the sum",
    all_reduce: "each rank has an addend of the sum, and the use needs the whole sum",
    all_reduce_max: "each rank has the maximum of its part, and the use needs that of all",
    all_to_all: "each rank has a part of what every other one needs",
    shift: "keys and values visit the ranks of a ring one after another",
  };
  return [use, words[i.how]];
}

function computeWhy(plan: Plan, placed: PlacedInstruction): Rest {
  const { program, instruction } = placed;
  if (instruction.kind !== "compute") throw new Error(`${instruction.id} computes nothing`);
  const buffers = buffersOf(program);
  const { flops, bytes } = costOf(instruction, plan.mesh, buffers);
  const times = timesOf(placed);
  const { path, because } = keyOfCompute(instruction, placed.block.kind);
  const users = instructionsOf(program).filter(
    (i) => i !== instruction && readsOf(i).some((id) => Object.values(instruction.writes).includes(id)),
  );
  const [shown = instruction] = membersOf(instruction);
  const reads = Object.entries(shown.reads).map(([name, id]) => `${name}${shapeText(buffers.get(id))}`);
  const writes = Object.entries(shown.writes).map(([name, id]) => `${name}${shapeText(buffers.get(id))} ${buffers.get(id).dtype}`);
  return {
    is: "instruction",
    what: `${instruction.op}, kernel ${instruction.kernel}`,
    because: [
      because,
      ...usersText(
        "its results are",
        users.map(({ id }) => id),
      ),
    ],
    key: { path, value: keyValue(plan, path) },
    shapes: `${reads.join(" ")} -> ${writes.join(" ")}${moreTensors(instruction)}`,
    bytes,
    times_per_step: times,
    bytes_per_step: bytes * times,
    flops,
    share: 0,
    removed_by: curesOf(plan.job, { path }),
  };
}

const usersText = (what: string, ids: readonly string[]): string[] =>
  ids.length === 0 ? [] : [`${what} read by ${ids.slice(0, 3).join(", ")}${ids.length > 3 ? ` and ${ids.length - 3} more` : ""}`];

function bufferWhy(plan: Plan, program: Program, buffer: Buffer, alike: FoundId["alike"]): Rest {
  const memory = plan.memory.find(({ stage }) => stage === program.stage);
  const all = instructionsOf(program);
  const readers = all.filter((i) => readsOf(i).includes(buffer.id)).map(({ id }) => id);
  const bytes = buffer.within === undefined && buffer.part === undefined ? bytesOf[buffer.dtype] * elementsOf(buffer.shape) : 0;
  const copies = buffer.kind === "activation" ? (program.chunks[buffer.chunk ?? 0]?.copies ?? 1) : 1;
  const own = new Set(program.buffers.map(({ id }) => id));
  const equal = alike.filter(({ id }) => own.has(id)).length;
  const { path, because } = keyOfBuffer(plan.job, buffer, copies);
  return {
    is: "buffer",
    what: `${buffer.kind} buffer`,
    because: [because, ...usersText("it is", readers)],
    key: { path, value: keyValue(plan, path) },
    sharding: layoutText(plan, buffer),
    shapes: `${buffer.dtype} ${shapeText(buffer)} of [${buffer.sizes.join(",")}]`,
    bytes,
    times_per_step: copies,
    bytes_per_step: bytes * copies * equal,
    share: (bytes * copies * equal) / Math.max(1, memory?.peak ?? 1),
    removed_by: curesOf(plan.job, { path }),
  };
}

/** Returns the value of a job key; undefined if the job has none. */
function keyValue({ job }: Plan, path: string): unknown {
  let value: unknown = job;
  for (const key of path.split(".")) value = typeof value === "object" && value !== null ? Reflect.get(value, key) : undefined;
  return value;
}
