/** Exchange of blocks: pack, collective, unpack. A copy is left out where the axes are in the right order already. */
import type { CollectiveKind } from "../../../schemas/plan.ts";
import type { Reshard } from "../programBuilder.ts";
import type { Emitter } from "./emitter.ts";
import { type BlockAxis, countOf, isIn, isSameMemory, type MemoryAxis } from "./memoryAxes.ts";

/** The axes of both sides of a reshard step, and those of its group: the sub-axis with the largest stride first, as ranks are numbered. */
export interface Sides {
  readonly have: readonly MemoryAxis[];
  readonly want: readonly MemoryAxis[];
  readonly group: readonly BlockAxis[];
}

/** Emits a reshard step between `i.from` and `i.to`. */
export function exchangeBlocks(emitter: Emitter, i: Reshard, sides: Sides): void {
  const { have, want } = sides;
  switch (i.how) {
    case "slice":
    case "regrid":
      emitter.rearrange(i.id, i.from, have, i.to, want, i.subAxes);
      return;
    case "all_reduce":
    case "all_reduce_max":
    case "shift":
      emitter.collective(i, i.how, i);
      return;
    default:
      exchanges[i.how](emitter, i, sides);
  }
}

type Exchange = (emitter: Emitter, i: Reshard, sides: Sides) => void;
const exchanges: Readonly<Record<Extract<CollectiveKind, "all_gather" | "reduce_scatter" | "all_to_all">, Exchange>> = {
  all_gather(emitter, i, { have, want, group }) {
    const received = [...group, ...have];
    const isInOrder = isSameMemory(received, want);
    const { dtype } = emitter.buffer(i.from);
    const blocks = isInOrder ? i.to : emitter.temporary(`${i.id}.blocks`, dtype, [countOf(group), countOf(have)]);
    emitter.collective(i, "all_gather", { id: i.id, from: i.from, to: blocks });
    if (!isInOrder) emitter.rearrange(`${i.id}.unpack`, blocks, received, i.to, want);
  },
  reduce_scatter(emitter, i, { have, want, group }) {
    const sent = [...group, ...want];
    const isInOrder = isSameMemory(sent, have);
    const [a, b] = [emitter.buffer(i.from), emitter.buffer(i.to)];
    const packed = isInOrder ? a.id : emitter.temporary(`${i.id}.blocks`, a.dtype, [countOf(group), countOf(want)]);
    if (!isInOrder) emitter.rearrange(`${i.id}.pack`, a.id, have, packed, sent);
    // a result in the bytes of its source would overwrite blocks that other ranks have yet to read
    const own =
      isInOrder && b.within && b.within === (a.within ?? a.id) ? emitter.temporary(`${i.id}.own`, b.dtype, [countOf(want)]) : b.id;
    emitter.collective(i, "reduce_scatter", { id: i.id, from: packed, to: own });
    if (own !== b.id) emitter.rearrange(`${i.id}.keep`, own, want, b.id, want);
  },
  all_to_all(emitter, i, { have, want, group }) {
    const rest = have.filter((a) => !isIn(group, a));
    const blocks = [...group, ...rest];
    const shape = [countOf(group), countOf(rest)];
    const { dtype } = emitter.buffer(i.from);
    const sent = isSameMemory(blocks, have) ? i.from : emitter.temporary(`${i.id}.sent`, dtype, shape);
    if (sent !== i.from) emitter.rearrange(`${i.id}.pack`, i.from, have, sent, blocks);
    const received = isSameMemory(blocks, want) ? i.to : emitter.temporary(`${i.id}.received`, dtype, shape);
    emitter.collective(i, "all_to_all", { id: i.id, from: sent, to: received });
    if (received !== i.to) emitter.rearrange(`${i.id}.unpack`, received, blocks, i.to, want);
  },
};
