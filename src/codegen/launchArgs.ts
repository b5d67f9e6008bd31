/**
 * Arguments of launches as kernel generators write them. A string is the name of a buffer: an operand of the op, `rows` or `needed`. All
 * other arguments are those of the plan (`Arg` in schemas/plan.ts).
 */
import type { Arg, Launch } from "../../schemas/plan.ts";

type ArgOf<K extends Arg["kind"]> = Extract<Arg, { readonly kind: K }>;
/** An argument of a launch: the name of a buffer, or another argument of the plan. */
export type KernelArg = string | ArgOf<"scratch" | "start" | "attribute" | "tensor_map">;
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
/** A runtime attribute of the instruction, as 32 bits. */
export const attributeOf = (name: string): ArgOf<"attribute"> => ({ kind: "attribute", name });

/** Buffers that are no operands. */
const others: ReadonlyMap<string, Arg> = new Map([
  ["rows", { kind: "rows" }],
  ["needed", { kind: "needed" }],
]);

/** Returns a launch as the plan stores it. */
export const planLaunch = ({ args, ...launch }: GeneratedLaunch): Launch => ({
  ...launch,
  args: args.map((arg) => (typeof arg === "string" ? (others.get(arg) ?? { kind: "operand", name: arg }) : arg)),
});
