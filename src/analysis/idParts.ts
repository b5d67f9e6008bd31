/**
 * The parts of ids that name modules of the model. The nodes of a graph have the paths of their modules as ids (`layers.3.moe.shared.w1`,
 * src/model), their instructions and buffers begin with them, and a plan has no other record of its modules. The layer is a field of the plan.
 */

/** A module of the model; `vocab`: the embedding, the logits and the loss. */
export type ModuleName = "mtp" | "shared" | "moe" | "mlp" | "attn" | "vocab";

/** The parts of an id by which a module is found, the most special first. */
const moduleParts: readonly (readonly [part: string, module: ModuleName])[] = [
  ["shared", "shared"],
  ["moe", "moe"],
  ["mlp", "mlp"],
  ["attn", "attn"],
  ["loss", "vocab"],
  ["logits", "vocab"],
  ["embedding", "vocab"],
];

const partsOf = (id: string): readonly string[] => id.split(/[.@]/);

/** Returns the module of an id; undefined for ids outside the modules. All of a depth of multi-token prediction is of `mtp`. */
export function moduleOf(id: string): ModuleName | undefined {
  const parts = partsOf(id);
  return parts[0] === "mtp" ? "mtp" : moduleParts.find(([part]) => parts.includes(part))?.[1];
}

/** Returns whether backward computes a value again: clones of nodes have the part `again` (passes/backward.ts). */
export const isComputedAgain = (id: string): boolean => partsOf(id).includes("again");

/** Returns whether an instruction computes shared experts: nodes of them, not reshards of their weights. */
export const isOfSharedExperts = (id: string): boolean => id.includes(".moe.shared.");
