/**
 * Laws of pairs. A paired forward is followed by the backward of an earlier microbatch, the turns of a pair have all instructions of both
 * blocks, and no buffer passes from one block to the other: what one writes the other does not touch, unless it is an activation, of
 * which each microbatch has its own. So the numbers of a pair are those of its blocks one after the other, in either order.
 */
import { touchedBy, writesOf } from "../../schemas/effects.ts";
import type { BlockRun, Instruction, Pair, Program } from "../../schemas/plan.ts";
import { blockTag } from "../../schemas/program.ts";
import { BufferTable } from "../analysis/bufferTable.ts";
import { invariant } from "../ops/op.ts";

/** Throws an invariant if a program breaks a law of pairs. `who` names its ranks in messages. */
export function verifyPairs(p: Program, who: string): void {
  const known = new Map<string, Pair>();
  for (const pair of p.pairs ?? []) {
    const key = `${pair.forward} ${pair.backward}`;
    invariant(!known.has(key), () => `${who}: the pair of forward ${pair.forward} and backward ${pair.backward} is stated twice`);
    known.set(key, pair);
    verifyPair(p, pair, who);
  }
  for (const [at, run] of p.order.entries()) {
    if (!run.paired) continue;
    const tag = (r: BlockRun): string => blockTag(r, p.chunks.length);
    const next = p.order[at + 1];
    invariant(
      run.kind === "forward" && next?.kind === "backward",
      () => `${who}: ${tag(run)} is paired, and ${next ? tag(next) : "the step block"} follows it; a pair is a forward and a backward`,
    );
    invariant(
      next.microbatch < run.microbatch,
      () => `${who}: ${tag(run)} is paired with ${tag(next)}, which is not of an earlier microbatch`,
    );
    invariant(
      known.has(`${run.chunk} ${next.chunk}`),
      () => `${who}: ${tag(run)} is paired with ${tag(next)}, and the plan does not state their turns`,
    );
  }
}

function verifyPair(p: Program, { forward, backward, turns }: Pair, who: string): void {
  const name = `${who}: the pair of forward ${forward} and backward ${backward}`;
  const blocks = { forward: p.chunks[forward]?.forward, backward: p.chunks[backward]?.backward };
  for (const [n, [kind, block]] of Object.entries(blocks).entries()) {
    invariant(block !== undefined, () => `${name} names a chunk of ${p.chunks.length}`);
    const length = turns.reduce((sum, turn, at) => sum + (at % 2 === n ? turn : 0), 0);
    invariant(length === block.length, () => `${name} has ${length} of ${block.length} instructions of ${kind}`);
  }
  const buffers = new BufferTable(p.buffers);
  const filled = new Set(p.inputs.map(({ buffer }) => buffer));
  // the forward of a pair is not of the first microbatch, and its backward not of the last
  const shared = effectsOf(
    (blocks.forward ?? []).filter(({ only }) => only !== "first"),
    buffers,
  );
  const own = effectsOf(
    (blocks.backward ?? []).filter(({ only }) => only !== "last"),
    buffers,
  );
  for (const [id, by] of own.touched) {
    const other = shared.touched.get(id);
    if (!other || buffers.get(id).kind === "activation") continue;
    const clash = own.written.has(id) || shared.written.has(id) ? "one of them writes it" : "the host fills it for each microbatch";
    invariant(
      !own.written.has(id) && !shared.written.has(id) && !(filled.has(id) && buffers.get(id).kind === "workspace"),
      () => `${name}: ${other} and ${by} touch ${id}, and ${clash}`,
    );
  }
}

/** Per buffer that a block touches, the first instruction that does; and the buffers that it writes. */
interface Effects {
  readonly touched: ReadonlyMap<string, string>;
  readonly written: ReadonlySet<string>;
}

/** Returns the effects of a block. What shares the bytes of another buffer counts as that one. */
function effectsOf(block: readonly Instruction[], buffers: BufferTable): Effects {
  const root = (id: string): string => buffers.rootOf(id);
  const touched = new Map<string, string>();
  const written = new Set<string>();
  for (const i of block) {
    for (const id of touchedBy(i, buffers)) if (!touched.has(root(id))) touched.set(root(id), i.id);
    for (const id of writesOf(i, buffers)) written.add(root(id));
  }
  return { touched, written };
}
