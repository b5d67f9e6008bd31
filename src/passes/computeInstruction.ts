/** Compute instructions as passes emit them. `generateKernels` fills in the kernel. */
import type { Compute } from "../../schemas/plan.ts";
import type { AnyOp } from "../ops/op.ts";

/** What an instruction consists of. */
interface Parts {
  readonly op: AnyOp;
  readonly id: string;
  readonly reads: Compute["reads"];
  readonly writes: Compute["writes"];
  readonly dims: Compute["dims"];
  readonly attrs?: Compute["attrs"];
  /** Outputs that are added to; default: those that the op updates in place, as far as they are written. */
  readonly accumulates?: readonly string[];
  /** The index buffer that the op writes. */
  readonly rows?: string | undefined;
}

/** Returns the compute instruction of an op. */
export function computeInstruction({ op, id, reads, writes, dims, attrs = {}, rows, ...more }: Parts): Compute {
  const accumulates = more.accumulates ?? op.inPlace?.filter((name) => writes[name] !== undefined) ?? [];
  return {
    ...{ kind: "compute", id, op: op.name, kernel: "", reads, writes, dims, attrs },
    ...(accumulates.length > 0 ? { accumulates: [...accumulates] } : {}),
    ...(rows === undefined ? {} : { rows }),
  };
}
