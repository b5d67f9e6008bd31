/** Orders of block runs as short text. */
import type { BlockRun } from "../../schemas/plan.ts";

const kinds: Readonly<Record<string, BlockRun["kind"]>> = { F: "forward", B: "backward", W: "weights" };

/** Returns the block runs of `F0 B0.1 W2`: forward, backward, weights of a microbatch, in a chunk. Throws on other text. */
export const blockRuns = (text: string): BlockRun[] =>
  text.split(" ").map((tag) => {
    const [, letter = "", microbatch, chunk = "0"] = /^([FBW])(\d+)(?:\.(\d+))?$/.exec(tag) ?? [];
    const kind = kinds[letter];
    if (!kind) throw new Error(`${tag} is no block run`);
    return { kind, microbatch: Number(microbatch), chunk: Number(chunk) };
  });
