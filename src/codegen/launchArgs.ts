/**
 * Arguments of launches as kernel generators write them. A string is the name of an operand of the op. All other arguments are those of
 * the plan (`Arg` in schemas/plan.ts).
 */
import type { Arg, Launch } from "../../schemas/plan.ts";

type ArgOf<K extends Arg["kind"]> = Extract<Arg, { readonly kind: K }>;
/** An argument of a launch: the name of an operand, or another argument of the plan. */
export type KernelArg = string | ArgOf<Exclude<Arg["kind"], "operand">>;
/** A launch before its arguments are completed to those of the plan. */
export interface GeneratedLaunch extends Omit<Launch, "args"> {
  readonly args: readonly KernelArg[];
}

/** The scratch arena from byte `offset` on. */
export const scratch = (offset: number): ArgOf<"scratch"> => ({ kind: "scratch", offset });
/** The scratch arena from its start. */
export const scratchStart = scratch(0);
/** The global index of this rank's first element of a dim. */
export const startOf = (dim: string): ArgOf<"start"> => ({ kind: "start", dim });
/** The first element of this rank's block of the input. */
export const ownBlock: ArgOf<"block"> = { kind: "block" };
/** A runtime attribute of the instruction, as 32 bits. */
export const attributeOf = (name: string): ArgOf<"attribute"> => ({ kind: "attribute", name });

/** The addresses of an operand of all tensors of a list. */
export const tensorList = (name: string, count: number): ArgOf<"tensors"> => ({ kind: "tensors", name, count });

/** The row index of the op's ragged values. */
export const rowIndex: ArgOf<"rows"> = { kind: "rows" };
/** The count of rows that an op needed, for ops that make rows. Ops of transport have an operand `needed` instead. */
export const neededRows: ArgOf<"needed"> = { kind: "needed" };

/** Returns a launch as the plan stores it. */
export const planLaunch = ({ args, ...launch }: GeneratedLaunch): Launch => ({
  ...launch,
  args: args.map((arg) => (typeof arg === "string" ? { kind: "operand", name: arg } : arg)),
});
