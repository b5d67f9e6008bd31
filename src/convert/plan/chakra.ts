/**
 * Execution traces in the format of MLCommons Chakra (schema/protobuf/et_def.proto): one file for each rank, a sequence of messages with their
 * lengths before them: GlobalMetadata, then Nodes. A node is an instruction of the step for one microbatch. It depends on the nodes that wrote
 * what it reads (data_deps), and on the node before it in its stream (ctrl_deps). Attributes have the names that ASTRA-sim reads.
 */
import { readsOf, writesOf } from "../../../schemas/effects.ts";
import type { Buffer, CollectiveKind, Instruction, Plan, Program } from "../../../schemas/plan.ts";
import { blockTag, groupsOf, microbatchesIn, runsIn, turnsOf } from "../../../schemas/program.ts";
import { numberInStage, rankAt, stageOfRank } from "../../../schemas/sharding.ts";
import { buffersOf } from "../../analysis/bufferTable.ts";
import { costOf } from "../../analysis/cost.ts";
import { Message } from "./protobuf.ts";
import type { RankGroup, RankGroups } from "./rankGroups.ts";

/** The fixed state of the schema that the field numbers are those of: its path and commit in mlcommons/chakra. */
const SCHEMA = "schema/protobuf/et_def.proto 6dc63e1";
/** Field numbers of `Node`, of `AttributeProto` and of `IOInfo`. */
const node = { id: 1, name: 2, type: 3, ctrl_deps: 4, data_deps: 5, duration_micros: 7, inputs: 8, attr: 10 } as const;
const attribute = { name: 1, int32: 7, int64: 9, uint64: 13, bool: 27, text: 29 } as const;
const types = { metadata: 1, compute: 4, send: 5, recv: 6, collective: 7 } as const;
const collectives: Readonly<Record<Exclude<CollectiveKind, "shift">, number>> = {
  all_reduce: 0,
  all_reduce_max: 0,
  all_gather: 2,
  all_to_all: 6,
  reduce_scatter: 7,
};

type Attribute = keyof Omit<typeof attribute, "name">;
function attributeOf(name: string, kind: Attribute, value: number | string | boolean): Message {
  const message = new Message().text(attribute.name, name);
  return typeof value === "string" ? message.text(attribute[kind], value) : message.member(attribute[kind], Number(value));
}

/** Options of a trace: seconds of an instruction, if an estimate knows them. */
export interface ChakraOptions {
  readonly secondsOf?: (i: Instruction) => number;
}

/** Yields the bytes of the trace of a rank. The communicators that it uses are added to `communicators`. */
export function* chakraTrace(
  plan: Plan,
  rank: number,
  communicators: RankGroups,
  { secondsOf }: ChakraOptions = {},
): Generator<Uint8Array> {
  const { job, mesh, programs, toolchain } = plan;
  const stage = stageOfRank(mesh, rank);
  const program = programs[stage];
  if (!program) throw new Error(`rankc: the plan has no stage ${stage}`);
  const metadata = new Message().text(1, SCHEMA);
  for (const [name, value] of [
    ["job", job.name],
    ["generator", `rankc ${toolchain.rankc}`],
  ] as const)
    metadata.message(2, attributeOf(name, "text", value));
  metadata.message(2, attributeOf("rank", "int64", rank)).message(2, attributeOf("world", "int64", mesh.world));
  yield metadata.delimited();
  const own = communicatorsOf(program, rank, communicators);
  yield new Message()
    .uint(node.id, 1)
    .text(node.name, "## process_group:init ##")
    .uint(node.type, types.metadata)
    .message(node.inputs, new Message().text(1, JSON.stringify(own.map(groupText))))
    .delimited();
  yield* nodesOf(plan, program, rank, communicators, secondsOf);
}

const groupText = ({ name, axes, ranks }: RankGroup) => ({ pg_name: name, pg_desc: axes, ranks, group_size: ranks.length });

/** Returns the communicators of the collectives of a rank. */
function communicatorsOf({ chunks, step }: Program, rank: number, communicators: RankGroups): RankGroup[] {
  const found = new Set<RankGroup>();
  for (const i of [...chunks.flatMap((c) => [...c.forward, ...c.backward, ...c.weights]), ...step])
    if (i.kind === "collective") found.add(communicators.of(rank, i));
  return [...found];
}

/** Numbers nodes and finds their dependencies. */
class Dependencies {
  #next = 2;
  readonly #writers = new Map<string, number>();
  readonly #lastOf = new Map<string, number>();
  readonly #buffers: ReadonlyMap<string, Buffer>;

  constructor(buffers: readonly Buffer[]) {
    this.#buffers = new Map(buffers.map((b) => [b.id, b]));
  }
  /** Returns a node of a stream with the nodes that it waits for. `copy` tells the activations of microbatches apart. */
  add(stream: string, reads: readonly string[], writes: readonly string[], copy: string): { id: number; ctrl: number[]; data: number[] } {
    const id = this.#next++;
    const key = (buffer: string): string => (this.#buffers.get(buffer)?.kind === "activation" ? `${buffer} ${copy}` : buffer);
    const data = new Set<number>();
    for (const buffer of reads) {
      const rows = this.#buffers.get(buffer)?.rows;
      for (const read of rows === undefined ? [buffer] : [buffer, rows]) {
        const writer = this.#writers.get(key(read));
        if (writer !== undefined) data.add(writer);
      }
    }
    for (const buffer of writes) this.#writers.set(key(buffer), id);
    const before = this.#lastOf.get(stream);
    this.#lastOf.set(stream, id);
    return { id, ctrl: before === undefined || data.has(before) ? [] : [before], data: [...data].sort((a, b) => a - b) };
  }
}

function* nodesOf(
  { mesh }: Plan,
  program: Program,
  rank: number,
  communicators: RankGroups,
  secondsOf: ChakraOptions["secondsOf"],
): Generator<Uint8Array> {
  const buffers = buffersOf(program);
  const known = new Map(program.buffers.map((b) => [b.id, b]));
  const dependencies = new Dependencies(program.buffers);
  const last = microbatchesIn(program) - 1;
  /** Per instruction, its latest node, for those that wait for it. */
  const latest = new Map<string, number>();
  const runs = [
    ...groupsOf(program.order)
      .flatMap((group) => turnsOf(program, group))
      .map(({ run, instructions }) => ({
        block: instructions,
        tag: blockTag(run, program.chunks.length),
        copy: `${run.microbatch}`,
        isFirst: run.microbatch === 0,
        isLast: run.microbatch === last,
      })),
    { block: program.step, tag: "step", copy: "", isFirst: true, isLast: true },
  ];
  for (const { block, tag, copy, isFirst, isLast } of runs)
    for (const i of block) {
      if (!runsIn(i, { first: isFirst, last: isLast, logged: true })) continue;
      const waited = (i.waits ?? []).flatMap((id) => latest.get(id) ?? []);
      const writes = writesOf(i, known);
      const reads = i.kind === "compute" ? [...readsOf(i), ...(i.accumulates ?? []).flatMap((name) => i.writes[name] ?? [])] : readsOf(i);
      for (const part of partsOf(i, mesh, rank, communicators)) {
        const { id, ctrl, data } = dependencies.add(
          part.stream,
          part.type === types.recv ? [] : reads,
          part.type === types.send ? [] : writes,
          copy,
        );
        const message = new Message().uint(node.id, id).text(node.name, `${tag} ${part.name}`).uint(node.type, part.type);
        latest.set(i.id, id);
        message.list(node.ctrl_deps, [...new Set([...ctrl, ...waited])]).list(node.data_deps, data);
        if (secondsOf) message.uint(node.duration_micros, Math.round(secondsOf(i) * 1e6));
        const attributes = [attributeOf("is_cpu_op", "bool", false), ...part.attributes];
        if (part.type === types.compute) {
          const { flops, bytes } = costOf(i, mesh, buffers);
          attributes.push(attributeOf("num_ops", "int64", Math.round(flops)), attributeOf("tensor_size", "uint64", Math.round(bytes)));
        }
        for (const a of attributes) message.message(node.attr, a);
        yield message.delimited();
      }
    }
}

/** A node of an instruction: type, name, the stream that it runs on, and its attributes. */
interface NodePart {
  readonly type: (typeof types)[keyof typeof types];
  readonly name: string;
  readonly stream: string;
  readonly attributes: readonly Message[];
}

/** Returns the nodes of an instruction on a rank: a shift is a send and a receive, all others are one node. */
function partsOf(i: Instruction, mesh: Plan["mesh"], rank: number, communicators: RankGroups): NodePart[] {
  if (i.kind === "compute") return [{ type: types.compute, name: i.id, stream: "compute", attributes: [attributeOf("op", "text", i.op)] }];
  const pair = (kind: "send" | "recv", id: string, peer: number, bytes: number, tag: string): NodePart => ({
    type: types[kind],
    ...{ name: id, stream: `${kind} ${peer}` },
    attributes: [
      attributeOf("comm_src", "int32", kind === "send" ? rank : peer),
      attributeOf("comm_dst", "int32", kind === "send" ? peer : rank),
      attributeOf("comm_size", "int64", bytes),
      attributeOf("tag", "text", tag),
    ],
  });
  if (i.kind !== "collective") {
    const peer = rankAt(mesh, i.peer, numberInStage(mesh, rank));
    return [pair(i.kind, i.id, peer, i.bytes, i.tag)];
  }
  const group = communicators.of(rank, i);
  if (i.how === "shift") {
    const at = group.ranks.indexOf(rank);
    const member = (n: number): number => group.ranks[(n + group.ranks.length) % group.ranks.length] ?? rank;
    return [pair("send", `${i.id}.send`, member(at + 1), i.bytes, i.id), pair("recv", `${i.id}.recv`, member(at - 1), i.bytes, i.id)];
  }
  const attributes = [
    attributeOf("comm_type", "int64", collectives[i.how]),
    attributeOf("comm_size", "int64", i.bytes),
    attributeOf("pg_name", "text", group.name),
    attributeOf("axes", "text", i.axes),
  ];
  return [{ type: types.collective, name: i.id, stream: `collective ${group.name}`, attributes }];
}
