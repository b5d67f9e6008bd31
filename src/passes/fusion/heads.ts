/** Fusion of the norm of each head with the rotation that follows it, and of their gradients: queries and keys pass through memory once. */
import type { Compute, Instruction } from "../../../schemas/plan.ts";
import type { BufferUses } from "./bufferUses.ts";

/** Replaces a norm of heads and a rotation of all channels, and the gradients of both, by one instruction each. */
export function fuseHeads(list: readonly Instruction[], uses: BufferUses): Instruction[] {
  const producers = new Map<string, Compute>();
  const gone = new Set<Instruction>();
  const out = list.map((i) => {
    const fused = i.kind === "compute" ? (forwardOf(i, producers, uses) ?? backwardOf(i, producers, uses)) : undefined;
    if (fused) gone.add(fused.first);
    if (i.kind === "compute" && i.writes.y !== undefined && (i.op === "head_norm" || i.op === "rope")) producers.set(i.writes.y, i);
    return fused?.by ?? i;
  });
  return out.filter((i) => !gone.has(i));
}

interface Fused {
  readonly first: Compute;
  readonly by: Compute;
}

/** Returns the instruction that replaces a rotation and the norm before it; undefined if there is none. */
function forwardOf(i: Compute, producers: ReadonlyMap<string, Compute>, uses: BufferUses): Fused | undefined {
  const { x } = i.reads;
  const first = i.op === "rope" && x !== undefined && uses.isBetweenTwo(x) ? producers.get(x) : undefined;
  const { x: from, gain } = first?.reads ?? {};
  if (first?.op !== "head_norm" || from === undefined || gain === undefined || !canRotate(i, first)) return undefined;
  uses.delete(x ?? "");
  return { first, by: { ...i, op: "head_norm_rope", attrs: attributes(first, i), dims: first.dims, reads: { x: from, weight: gain } } };
}

/** Returns the instruction that replaces the gradient of a norm and that of the rotation before it; undefined if there is none. */
function backwardOf(i: Compute, producers: ReadonlyMap<string, Compute>, uses: BufferUses): Fused | undefined {
  const { x, gain, dy } = i.reads;
  const { dx, dgain } = i.writes;
  const first = i.op === "head_norm_grad" && dy !== undefined && uses.isBetweenTwo(dy) ? producers.get(dy) : undefined;
  const from = first?.reads.x;
  if (first?.op !== "rope" || from === undefined || x === undefined || gain === undefined || !canRotate(first, i)) return undefined;
  if (dx === undefined || dgain === undefined) return undefined;
  uses.delete(dy ?? "");
  const { accumulates, ...rest } = i;
  const by: Compute = {
    ...rest,
    op: "head_norm_rope_grad",
    attrs: attributes(i, first),
    reads: { x, weight: gain, dy: from },
    writes: { dx, dweight: dgain },
    ...(accumulates && { accumulates: accumulates.map((name) => (name === "dgain" ? "dweight" : name)) }),
  };
  return { first, by };
}

/** Returns whether a rotation turns all channels of the heads of a norm, which has the same shards of them. */
function canRotate(rotation: Compute, norm: Compute): boolean {
  const { first, width, C } = rotation.attrs;
  const isEqual = (["B", "S", "H"] as const).every((dim) => JSON.stringify(rotation.dims[dim]) === JSON.stringify(norm.dims[dim]));
  return isEqual && first === 0 && width === C && C === norm.attrs.C && rotation.ringOffset === undefined && norm.ringOffset === undefined;
}

/** Returns the attributes of a norm and of a rotation of all channels. */
function attributes(norm: Compute, { attrs: { first: _, width: __, ...rotation } }: Compute): Compute["attrs"] {
  return { ...norm.attrs, ...rotation };
}
