/**
 * Parameters that are gathered in the forward that uses them. A step then ends with the shards of the main weights alone: the first
 * microbatch casts and gathers them on the stream `parameters`, two buckets ahead of their use, and an evaluation does the same. The
 * buckets that forward uses first stay in the step block, beside the updates of the others: their gathering would delay the forward.
 */
import { touchedBy } from "../../../schemas/effects.ts";
import type { Buffer, Collective, Compute, Instruction, Program } from "../../../schemas/plan.ts";
import { BufferTable } from "../../analysis/bufferTable.ts";
import { type Bucket, BucketFiller, type Chain, collectivesOf, withWaits } from "./buckets.ts";

/** How many buckets are under way at a time, and how many the step block gathers. */
const AHEAD = 2;

/** The first part of all ids of an evaluation. */
const EVALUATED = "eval.";

/** The gathering of a parameter from the shards of its main weights. */
interface Gather extends Chain {
  readonly parameter: string;
  /** The cast of a shard into the type of the parameter, where it has another one than the main weights. */
  readonly cast: Compute | undefined;
  readonly links: readonly [Collective];
}
/** A gather, and the first instruction of a block that uses its parameter. */
interface UsedGather extends Gather {
  readonly at: number;
}
interface Block {
  readonly instructions: readonly Instruction[];
  readonly buckets: readonly Bucket<UsedGather>[];
}

/** Returns a program that gathers parameters in forward, in buckets of at least so many bytes. */
export function gatherInForward(program: Program, bytes: number): Program {
  const buffers = new BufferTable(program.buffers);
  const gathers = gathersOf(program, buffers);
  const forward = blocksWith(
    program.chunks.map((c) => c.forward),
    gathers,
    buffers,
    bytes,
  );
  for (const { chains } of forward[0]?.buckets.slice(0, AHEAD) ?? []) for (const { parameter } of chains) gathers.delete(parameter);
  const late = forward.map(({ buckets, ...block }, chunk) => ({ ...block, buckets: chunk === 0 ? buckets.slice(AHEAD) : buckets }));
  const used = new Set(late.flatMap(({ buckets }) => buckets.flatMap(({ chains }) => chains.map(({ parameter }) => parameter))));
  if (used.size === 0) return program;
  for (const parameter of [...gathers.keys()]) if (!used.has(parameter)) gathers.delete(parameter);
  const moved = new Set<Instruction>([...gathers.values()].flatMap(({ cast, links }) => [...(cast ? [cast] : []), ...links]));
  const evaluated = program.evaluation && withEvaluation(program.evaluation, gathers, buffers, bytes);
  return {
    ...program,
    buffers: [...program.buffers, ...(evaluated?.added ?? [])],
    chunks: program.chunks.map((c, n) => ({ ...c, forward: late[n] ? gathering(late[n], buffers) : c.forward })),
    step: program.step.filter((i) => !moved.has(i)),
    ...(evaluated && { evaluation: evaluated.evaluation }),
  };
}

/** Returns per parameter its gathering in the step block, if it may move: nothing else of the block reads the parameter or the shard. */
function gathersOf({ step, parameters }: Program, buffers: BufferTable): Map<string, Gather> {
  const touching = new Map<string, Instruction[]>();
  for (const i of step) for (const id of touchedBy(i, buffers)) touching.set(id, [...(touching.get(id) ?? []), i]);
  const own = new Set(parameters.map(({ buffer }) => buffer));
  const gathers = new Map<string, Gather>();
  for (const i of step) {
    if (i.kind !== "collective" || i.how !== "all_gather" || i.world || !own.has(i.to) || touching.get(i.to)?.length !== 1) continue;
    const gather = { parameter: i.to, links: [i] as const, bytes: buffers.bytesOf(i.to) };
    const cast = (touching.get(i.from) ?? []).find((by): by is Compute => by.kind === "compute" && by.op === "cast");
    if (buffers.get(i.from).kind === "optimizer") gathers.set(i.to, { ...gather, cast: undefined });
    else if (cast && touching.get(i.from)?.length === 2 && buffers.get(cast.reads.x ?? "").kind === "optimizer")
      gathers.set(i.to, { ...gather, cast });
  }
  return gathers;
}

/** Returns blocks that run one after another, each with the buckets of the parameters that none before it uses, in the order of their use. */
function blocksWith(
  blocks: readonly (readonly Instruction[])[],
  gathers: ReadonlyMap<string, Gather>,
  buffers: BufferTable,
  bytes: number,
): Block[] {
  const left = new Map(gathers);
  return blocks.map((instructions): Block => {
    const filler = new BucketFiller<UsedGather>(buffers, bytes);
    const closed: Bucket<UsedGather>[] = [];
    for (const [at, i] of instructions.entries())
      for (const id of touchedBy(i, buffers)) {
        const gather = left.get(id);
        left.delete(id);
        const bucket = gather && filler.add({ ...gather, at });
        if (bucket) closed.push(bucket);
      }
    return { instructions, buckets: [...closed, ...filler.rest()].sort((a, b) => a.chains[0].at - b.chains[0].at) };
  });
}

/** Returns the instructions of a block with its buckets: the first at its begin, each other when the one two before it is used. */
function gathering({ instructions, buckets }: Block, buffers: BufferTable, prefix = ""): Instruction[] {
  const inserted = new Map<number, Instruction[]>();
  const begun: string[] = [];
  for (const [n, bucket] of buckets.entries()) {
    const { chains } = bucket;
    const casts = chains.flatMap(({ cast }) => (cast ? [cast] : []));
    const collectives = collectivesOf(bucket, {
      ...{ id: prefix + (chains.at(-1)?.parameter ?? ""), stream: "parameters", path: "parallel.parameter_gather" },
      because: "each rank updated its shard",
    });
    const before = begun[n - AHEAD];
    const own = [...casts, ...collectives].map(
      (i, k): Instruction => ({ ...i, only: "first", ...(k === 0 && before !== undefined && { waits: [before] }) }),
    );
    const at = buckets[n - AHEAD]?.chains[0].at ?? 0;
    inserted.set(at, [...(inserted.get(at) ?? []), ...own]);
    begun.push(collectives.at(-1)?.id ?? "");
  }
  return withWaits(
    instructions.flatMap((i, at) => [...(inserted.get(at) ?? []), i]),
    [],
    buffers,
  );
}

/** Returns an evaluation that gathers the same parameters in the first microbatch of each batch, and the buffers of its shards. */
function withEvaluation(
  evaluation: NonNullable<Program["evaluation"]>,
  gathers: ReadonlyMap<string, Gather>,
  buffers: BufferTable,
  bytes: number,
): { evaluation: NonNullable<Program["evaluation"]>; added: Buffer[] } {
  const added: Buffer[] = [];
  const name = (id: string): string => EVALUATED + id;
  const renamed = [...gathers].map(
    ([
      parameter,
      {
        cast,
        links: [gather],
        ...rest
      },
    ]): [string, Gather] => {
      if (!cast) return [parameter, { ...rest, cast, links: [{ ...gather, id: name(gather.id) }] }];
      const shard = { ...buffers.get(gather.from), id: name(gather.from) };
      added.push(shard);
      const own: Compute = { ...cast, id: name(cast.id), writes: { y: shard.id } };
      return [parameter, { ...rest, cast: own, links: [{ ...gather, id: name(gather.id), from: shard.id }] }];
    },
  );
  const all = new BufferTable([...buffers.values(), ...added]);
  const blocks = blocksWith(evaluation.chunks, new Map(renamed), all, bytes);
  return { added, evaluation: { ...evaluation, chunks: blocks.map((block) => gathering(block, all, EVALUATED)) } };
}
