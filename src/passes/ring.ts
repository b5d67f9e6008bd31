/**
 * ring: attention whose keys and values are not gathered (Liu et al. 2023). Each rank keeps its queries; the pieces of the keys go
 * around the ranks that share the sequence, one place a turn, beside the work on the piece that is here. What a query finds in
 * each piece is merged; in backward the sums for keys and values travel with their piece, and come home after the last turn.
 */

import type { Buffer, Collective, Compute } from "../../schemas/plan.ts";
import { shardCount } from "../../schemas/sharding.ts";
import { attention, attentionGrad, attentionMerge, attentionPart, attentionPartGrad } from "../ops/attention.ts";
import { attentionDropout, attentionDropoutGrad, attentionDropoutPart, attentionDropoutPartGrad } from "../ops/attentionDropout.ts";
import { add, cast } from "../ops/linear.ts";
import { type AnyOp, invariant } from "../ops/op.ts";
import { axesName } from "./mesh.ts";
import type { BlockBuilder, ProgramBuilder } from "./programBuilder.ts";

/** An instruction as it would be if its keys were here, and the dim whose pieces go around, cut like another. */
export interface RingUse {
  readonly instruction: Compute;
  readonly dim: string;
  readonly as: string;
  readonly path: string;
}

/** Whether the pieces of a dim are on different ranks. */
export const isRing = ({ mesh }: Pick<ProgramBuilder, "mesh">, { instruction, as }: Pick<RingUse, "instruction" | "as">): boolean =>
  shardCount(mesh, instruction.dims[as]![1]) > 1;

export function expandRing(role: ProgramBuilder, block: BlockBuilder, ring: RingUse): void {
  const { instruction: i } = ring;
  const ringOp = ringOps[i.op];
  invariant(ringOp !== undefined, `${i.id}: ${i.op} does not go around`);
  ringOp.go(ringSteps(role, block, ring, ringOp.part));
}

/** Ops that go around, and what each does on a piece. */
const ringOps: Readonly<Record<string, { readonly part: AnyOp; readonly go: (ringSteps: RingSteps) => void }>> = {
  [attention.name]: { part: attentionPart, go: forward },
  [attentionGrad.name]: { part: attentionPartGrad, go: backward },
  [attentionDropout.name]: { part: attentionDropoutPart, go: forward },
  [attentionDropoutGrad.name]: { part: attentionDropoutPartGrad, go: backward },
};

function ringSteps(role: ProgramBuilder, block: BlockBuilder, { instruction: i, dim, as, path }: RingUse, op: AnyOp) {
  const { mesh, buffers } = role;
  const subAxes = i.dims[as]![1];
  invariant(
    subAxes.every((f, n) => n === 0 || mesh.subAxes[f]!.stride < mesh.subAxes[subAxes[n - 1]!]!.stride),
    `${i.id}: pieces of ${dim} do not lie in the order of ranks`,
  );
  const like = (id: string, from: string, dtype: Buffer["dtype"]): string => {
    const { kind: _, chunk: __, within: ___, ...b } = buffers.get(from)!;
    return role.add({ ...b, id, kind: "workspace", dtype });
  };
  return {
    i,
    count: shardCount(mesh, subAxes),
    typeOf: (id: string) => buffers.get(id)!.dtype,
    like,
    /** The work on the piece of the rank so many places before this one. */
    part(id: string, reads: Compute["reads"], writes: Compute["writes"], ringOffset: number): void {
      const dims = { ...i.dims, [dim]: [i.dims[dim]![0], [...subAxes]] as [number, number[]] };
      role.emit(block, { ...i, id, op: op.name, reads, writes, dims, ...(ringOffset > 0 ? { ringOffset: { [dim]: ringOffset } } : {}) });
    },
    /** What this rank holds goes to the next one, and what the one before holds comes here. */
    pass(from: string, to: string): string {
      const move: Collective = {
        ...{ kind: "collective", id: `${to}.shift`, how: "shift", name: "ring", axes: axesName(mesh, subAxes, false) },
        ...{ subAxes: [...subAxes], from, to: like(to, from, buffers.get(from)!.dtype), bytes: role.bytes(from) },
        why: { op: i.id, because: `pieces of ${dim} are on other ranks`, path },
      };
      role.emit(block, move);
      return to;
    },
    emit: (one: Compute) => role.emit(block, one),
    /** Over whole buffers. */
    over: role.elementwise,
  };
}
type RingSteps = ReturnType<typeof ringSteps>;

function forward({ i, count, like, part, pass, emit, typeOf }: RingSteps): void {
  let { k, v } = i.reads;
  const [o, lse] = [i.writes.o!, i.writes.lse!];
  let [sum, log] = [o, lse];
  for (let n = 0; n < count; n++) {
    const here = { k: k!, v: v! };
    // the next piece is on its way while this one is worked on
    if (n < count - 1) [k, v] = [pass(here.k, `${i.id}.k.${n + 1}`), pass(here.v, `${i.id}.v.${n + 1}`)];
    const [found, its] = [like(`${i.id}.o.${n}`, o, typeOf(o)), like(`${i.id}.lse.${n}`, lse, "f32")];
    part(`${i.id}.${n}`, { ...i.reads, ...here }, { o: found, lse: its }, n);
    if (n === 0) {
      [sum, log] = [found, its];
      continue;
    }
    const last = n === count - 1;
    const [to, total] = last ? [o, lse] : [like(`${i.id}.o.to${n}`, o, "f32"), like(`${i.id}.lse.to${n}`, lse, "f32")];
    const { G, M, W, B, S } = {
      ...i.dims,
      ...Object.fromEntries(Object.entries(i.attrs).map(([a, x]) => [a, [x, []] as [number, number[]]])),
    };
    emit({
      ...{ kind: "compute", id: `${i.id}.merge${n}`, op: attentionMerge.name, kernel: "" },
      ...{ reads: { a: sum, la: log, b: found, lb: its }, writes: { o: to, lse: total } },
      dims: { B: B!, S: S!, H: [G![0] * M![0], G![1]] },
      attrs: { W: W![0] },
    });
    [sum, log] = [to, total];
  }
}

function backward({ i, count, like, part, pass, emit, over, typeOf }: RingSteps): void {
  let { k, v } = i.reads;
  const { dq, dk, dv } = i.writes;
  /** Sums so far, in f32: of this rank's queries, and of the piece that is here. */
  const sums: Record<"dq" | "dk" | "dv", string> = { dq: dq!, dk: dk!, dv: dv! };
  const sumUp = (name: keyof typeof sums, found: string, n: number): void => {
    const to = like(`${i.id}.${name}.to${n}`, found, "f32");
    if (n === 0) emit(over(cast, `${to}.cast`, { x: found }, { y: to }));
    else emit(over(add, `${to}.add`, { a: sums[name], b: found }, { y: to }));
    sums[name] = to;
  };
  for (let n = 0; n < count; n++) {
    const here = { k: k!, v: v! };
    if (n < count - 1) [k, v] = [pass(here.k, `${i.id}.k.${n + 1}`), pass(here.v, `${i.id}.v.${n + 1}`)];
    const made = {
      dq: like(`${i.id}.dq.${n}`, dq!, typeOf(dq!)),
      dk: like(`${i.id}.dk.${n}`, dk!, typeOf(dk!)),
      dv: like(`${i.id}.dv.${n}`, dv!, typeOf(dv!)),
    };
    part(`${i.id}.${n}`, { ...i.reads, ...here }, made, n);
    sumUp("dq", made.dq, n);
    for (const name of ["dk", "dv"] as const) {
      // sums of this piece from the rank that had it before
      if (n > 0) sums[name] = pass(sums[name], `${i.id}.${name}.at${n}`);
      sumUp(name, made[name], n);
    }
  }
  emit(over(cast, `${i.id}.dq.cast`, { x: sums.dq }, { y: dq! }));
  for (const name of ["dk", "dv"] as const)
    emit(over(cast, `${i.id}.${name}.cast`, { x: pass(sums[name], `${i.id}.${name}.home`) }, { y: i.writes[name]! }));
}
