/** Compute instructions as passes emit them. `generateKernels` fills in the kernel. */
import type { Compute } from "../../schemas/plan.ts";
import { ops } from "../ops/index.ts";
import { type AnyOp, expand, invariant, type Operand, rowsOperandOf } from "../ops/op.ts";
import { pairs, type ShardedValue } from "./layout.ts";
import type { ComputeStep } from "./sharding/steps.ts";

/** What an instruction consists of. */
interface Parts {
  readonly op: AnyOp;
  readonly id: string;
  readonly reads: Compute["reads"];
  readonly writes: Compute["writes"];
  readonly dims: Compute["dims"];
  readonly attrs?: Compute["attrs"];
  readonly blocks?: NonNullable<Compute["blocks"]>;
  /** Outputs that are added to; default: those that the op updates in place, as far as they are written. */
  readonly accumulates?: readonly string[];
  /** The index buffer that the op writes. */
  readonly rows?: string | undefined;
}

/** Returns the compute instruction of an op. */
export function computeInstruction({ op, id, reads, writes, dims, attrs = {}, blocks = [], rows, ...more }: Parts): Compute {
  const rowsOf = rowsOperandOf(op);
  const accumulates = more.accumulates ?? op.inPlace?.filter((name) => writes[name] !== undefined) ?? [];
  return {
    ...{ kind: "compute", id, op: op.name, kernel: "", reads, writes, dims, attrs },
    ...(blocks.length > 0 ? { blocks: [...blocks] } : {}),
    ...(accumulates.length > 0 ? { accumulates: [...accumulates] } : {}),
    ...(rows === undefined ? {} : { rows }),
    ...(rowsOf === undefined ? {} : { rows_of: rowsOf }),
  };
}

/** Returns the parts of the instruction of a compute step. `bufferOf` returns the buffer of a sharded value. */
export function partsOf({ node, ins, outs, dims: shardedBy }: ComputeStep, bufferOf: (v: ShardedValue) => string) {
  const { id, attrs, size } = node;
  const { name } = node.op;
  invariant(name !== "regrid", () => `${id}: a regrid is a reshard step`);
  const { inputs, outputs } = expand(node);
  const dims: Compute["dims"] = {};
  for (const operands of [inputs, outputs])
    for (const { any, dimSpecs } of operands)
      if (!any) for (const { dim } of dimSpecs) dims[dim] ??= [size[dim] ?? 1, [...(shardedBy.get(dim) ?? [])]];
  return {
    op: ops[name],
    id,
    reads: buffersOf(inputs, ins, bufferOf),
    writes: buffersOf(outputs, outs, bufferOf),
    dims,
    attrs: { ...attrs },
  };
}

/** Returns the buffers of operands by their names. */
function buffersOf(
  operands: readonly Operand[],
  values: readonly ShardedValue[],
  bufferOf: (v: ShardedValue) => string,
): Record<string, string> {
  const named: Record<string, string> = {};
  for (const [{ name }, value] of pairs(operands, values)) named[name] = bufferOf(value);
  return named;
}
