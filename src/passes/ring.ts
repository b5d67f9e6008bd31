/**
 * Ring attention (Liu et al. 2023): keys and values are not gathered. Each rank keeps its queries. Blocks of keys and values shift by
 * one rank per step, while attention runs on the block that is present. Partial results are merged by their log-sum-exp. In backward,
 * the gradients of keys and values shift with their block and return to its rank after the last step.
 */

import type { Buffer, Collective, Compute } from "../../schemas/plan.ts";
import { shardCount, subAxisOf } from "../../schemas/sharding.ts";
import { attention, attentionGrad, attentionMerge, attentionPart, attentionPartGrad } from "../ops/attention.ts";
import {
  attentionDocuments,
  attentionDocumentsGrad,
  attentionDocumentsPart,
  attentionDocumentsPartGrad,
  attentionDropoutDocuments,
  attentionDropoutDocumentsGrad,
  attentionDropoutDocumentsPart,
  attentionDropoutDocumentsPartGrad,
} from "../ops/attentionDocuments.ts";
import { attentionDropout, attentionDropoutGrad, attentionDropoutPart, attentionDropoutPartGrad } from "../ops/attentionDropout.ts";
import { add, cast } from "../ops/gemm.ts";
import { type AnyOp, invariant } from "../ops/op.ts";
import { computeInstruction } from "./computeInstruction.ts";
import { axesName } from "./mesh.ts";
import type { BlockBuilder, ProgramBuilder } from "./programBuilder.ts";

/** An attention instruction over all keys, and the dim whose blocks shift around the ring. That dim is sharded like dim `as`. */
export interface RingUse {
  readonly instruction: Compute;
  readonly dim: string;
  readonly as: string;
  readonly path: string;
}

/** Returns whether the blocks of the ring dim are on different ranks. */
export const isRing = ({ mesh }: Pick<ProgramBuilder, "mesh">, { instruction, as }: Pick<RingUse, "instruction" | "as">): boolean =>
  shardCount(mesh, dimOf(instruction, as)[1]) > 1;

/** Returns the size of a dim and the sub-axes that shard it. Throws an invariant if the instruction has no such dim. */
function dimOf({ id, dims }: Pick<Compute, "id" | "dims">, dim: string): Compute["dims"][string] {
  const found = dims[dim];
  invariant(found !== undefined, () => `${id} has no dim ${dim}`);
  return found;
}

/** Returns the buffer of an operand. Throws an invariant if the instruction has no such operand. */
function operandOf({ id, reads, writes }: Compute, name: string): string {
  const found = reads[name] ?? writes[name];
  invariant(found !== undefined, () => `${id} has no operand ${name}`);
  return found;
}

/** Emits the steps of ring attention in place of one attention instruction. Throws an invariant if the op has no ring form. */
export function expandRing(role: ProgramBuilder, block: BlockBuilder, ring: RingUse): void {
  const { instruction: i } = ring;
  const ringOp = ringOps[i.op];
  invariant(ringOp !== undefined, `${i.id}: ${i.op} has no ring form`);
  ringOp.expand(ringSteps(role, block, ring, ringOp.part));
}

/** Per op with a ring form, the op for one block and the expansion. */
const ringOps: Readonly<Record<string, { readonly part: AnyOp; readonly expand: (ringSteps: RingSteps) => void }>> = {
  [attention.name]: { part: attentionPart, expand: forward },
  [attentionGrad.name]: { part: attentionPartGrad, expand: backward },
  [attentionDropout.name]: { part: attentionDropoutPart, expand: forward },
  [attentionDropoutGrad.name]: { part: attentionDropoutPartGrad, expand: backward },
  [attentionDocuments.name]: { part: attentionDocumentsPart, expand: forward },
  [attentionDocumentsGrad.name]: { part: attentionDocumentsPartGrad, expand: backward },
  [attentionDropoutDocuments.name]: { part: attentionDropoutDocumentsPart, expand: forward },
  [attentionDropoutDocumentsGrad.name]: { part: attentionDropoutDocumentsPartGrad, expand: backward },
};

/** Returns the operations that the two expansions share. */
function ringSteps(role: ProgramBuilder, block: BlockBuilder, { instruction: i, dim, as, path }: RingUse, op: AnyOp) {
  const { mesh, buffers } = role;
  const [, subAxes] = dimOf(i, as);
  const strides = subAxes.map((f) => subAxisOf(mesh, f).stride);
  invariant(
    strides.every((stride, n) => n === 0 || stride < (strides[n - 1] ?? 0)),
    `${i.id}: blocks of ${dim} are not in the order of ranks`,
  );
  /** Adds a workspace buffer with the shape of `from`. Returns its id. */
  const like = (id: string, from: string, dtype: Buffer["dtype"]): string => {
    const { kind: _, chunk: __, within: ___, ...b } = buffers.get(from);
    return role.add({ ...b, id, kind: "workspace", dtype });
  };
  return {
    i,
    count: shardCount(mesh, subAxes),
    typeOf: (id: string) => buffers.get(id).dtype,
    like,
    /** Emits the op on the block of the rank that is `ringOffset` places before this one. */
    part(id: string, reads: Compute["reads"], writes: Compute["writes"], ringOffset: number): void {
      const own: Compute["dims"][string] = [dimOf(i, dim)[0], [...subAxes]];
      const dims = { ...i.dims, [dim]: own };
      role.emit(block, { ...i, id, op: op.name, reads, writes, dims, ...(ringOffset > 0 ? { ringOffset: { [dim]: ringOffset } } : {}) });
    },
    /** Emits the shift of a buffer by one rank. Returns the buffer that receives. */
    shift(from: string, to: string): string {
      const { layer } = buffers.get(from);
      const collective: Collective = {
        ...{ kind: "collective", id: `${to}.shift`, how: "shift", name: "ring", axes: axesName(mesh, subAxes, false) },
        ...{ subAxes: [...subAxes], from, to: like(to, from, buffers.get(from).dtype), bytes: role.bytes(from) },
        why: { op: i.id, because: `pieces of ${dim} are on other ranks`, path, ...(layer === undefined ? {} : { layer }) },
      };
      role.emit(block, collective);
      return to;
    },
    emit: (one: Compute) => role.emit(block, one),
    elementwise: role.elementwise,
  };
}
type RingSteps = ReturnType<typeof ringSteps>;

function forward({ i, count, like, part, shift, emit, typeOf }: RingSteps): void {
  let next = { k: operandOf(i, "k"), v: operandOf(i, "v") };
  const [o, lse] = [operandOf(i, "o"), operandOf(i, "lse")];
  let [sum, sumLse] = [o, lse];
  for (let n = 0; n < count; n++) {
    const here = next;
    // the next block is transferred while attention runs on this one
    if (n < count - 1) next = { k: shift(here.k, `${i.id}.k.${n + 1}`), v: shift(here.v, `${i.id}.v.${n + 1}`) };
    const [partial, partialLse] = [like(`${i.id}.o.${n}`, o, typeOf(o)), like(`${i.id}.lse.${n}`, lse, "f32")];
    part(`${i.id}.${n}`, { ...i.reads, ...here }, { o: partial, lse: partialLse }, n);
    if (n === 0) {
      [sum, sumLse] = [partial, partialLse];
      continue;
    }
    const last = n === count - 1;
    const [to, toLse] = last ? [o, lse] : [like(`${i.id}.o.to${n}`, o, "f32"), like(`${i.id}.lse.to${n}`, lse, "f32")];
    const [groups, shardedBy] = dimOf(i, "G");
    const { M = 1, W = 1 } = i.attrs;
    emit(
      computeInstruction({
        ...{ op: attentionMerge, id: `${i.id}.merge${n}` },
        ...{ reads: { a: sum, la: sumLse, b: partial, lb: partialLse }, writes: { o: to, lse: toLse } },
        dims: { B: dimOf(i, "B"), S: dimOf(i, "S"), H: [groups * M, shardedBy] },
        attrs: { W },
      }),
    );
    [sum, sumLse] = [to, toLse];
  }
}

function backward({ i, count, like, part, shift, emit, elementwise, typeOf }: RingSteps): void {
  let next = { k: operandOf(i, "k"), v: operandOf(i, "v") };
  const results = { dq: operandOf(i, "dq"), dk: operandOf(i, "dk"), dv: operandOf(i, "dv") };
  /** Running f32 sums: gradients of this rank's queries, and of the keys and values of the present block. */
  const sums: Record<"dq" | "dk" | "dv", string> = { ...results };
  const sumUp = (name: keyof typeof sums, addend: string, n: number): void => {
    const to = like(`${i.id}.${name}.to${n}`, addend, "f32");
    if (n === 0) emit(elementwise(cast, `${to}.cast`, { x: addend }, { y: to }));
    else emit(elementwise(add, `${to}.add`, { a: sums[name], b: addend }, { y: to }));
    sums[name] = to;
  };
  for (let n = 0; n < count; n++) {
    const here = next;
    if (n < count - 1) next = { k: shift(here.k, `${i.id}.k.${n + 1}`), v: shift(here.v, `${i.id}.v.${n + 1}`) };
    const partOf = (name: keyof typeof results) => like(`${i.id}.${name}.${n}`, results[name], typeOf(results[name]));
    const made = { dq: partOf("dq"), dk: partOf("dk"), dv: partOf("dv") };
    part(`${i.id}.${n}`, { ...i.reads, ...here }, made, n);
    sumUp("dq", made.dq, n);
    for (const name of ["dk", "dv"] as const) {
      // receive the sums of this block from the rank that had it before
      if (n > 0) sums[name] = shift(sums[name], `${i.id}.${name}.at${n}`);
      sumUp(name, made[name], n);
    }
  }
  emit(elementwise(cast, `${i.id}.dq.cast`, { x: sums.dq }, { y: results.dq }));
  for (const name of ["dk", "dv"] as const)
    emit(elementwise(cast, `${i.id}.${name}.cast`, { x: shift(sums[name], `${i.id}.${name}.home`) }, { y: results[name] }));
}
