/** Compute instructions as passes emit them. `generateKernels` fills in the kernel. */
import type { Compute } from "../../schemas/plan.ts";
import { ops } from "../ops/index.ts";
import { type AnyOp, expand, invariant } from "../ops/op.ts";
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
  const accumulates = more.accumulates ?? op.inPlace?.filter((name) => writes[name] !== undefined) ?? [];
  return {
    ...{ kind: "compute", id, op: op.name, kernel: "", reads, writes, dims, attrs },
    ...(blocks.length > 0 ? { blocks: [...blocks] } : {}),
    ...(accumulates.length > 0 ? { accumulates: [...accumulates] } : {}),
    ...(rows === undefined ? {} : { rows }),
  };
}

/** Returns the parts of the instruction of a compute step. `bufferOf` returns the buffer of a sharded value. */
export function partsOf({ node, ins, outs, dims: shardedBy }: ComputeStep, bufferOf: (v: ShardedValue) => string) {
  const { id, attrs, size } = node;
  const { name } = node.op;
  invariant(name !== "regrid", () => `${id}: a regrid is a reshard step`);
  const { inputs, outputs } = expand(node);
  const dims: Compute["dims"] = {};
  for (const { dim } of [...inputs, ...outputs].flatMap((o) => (o.any ? [] : o.dimSpecs)))
    dims[dim] = [size[dim] ?? 1, [...(shardedBy.get(dim) ?? [])]];
  const reads = Object.fromEntries(pairs(inputs, ins).map(([o, v]) => [o.name, bufferOf(v)]));
  const writes = Object.fromEntries(pairs(outputs, outs).map(([o, v]) => [o.name, bufferOf(v)]));
  return { op: ops[name], id, reads, writes, dims, attrs: { ...attrs } };
}
