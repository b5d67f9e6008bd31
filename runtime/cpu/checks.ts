/** The check of the CPU backend for `rankc doctor`. */
import { availableParallelism, totalmem } from "node:os";
import type { CheckList } from "../checkList.ts";

/** Adds the check of the CPU backend: cores and memory. */
export function checkCpu(list: CheckList): void {
  const cores = availableParallelism();
  list.check(["cpu"], "cpu", () => [
    `${cores} core${cores === 1 ? "" : "s"}, ${(memory() / 2 ** 30).toFixed(1)} GiB of memory: rankc run --backend cpu works`,
  ]);
}

/** Returns the memory in bytes; in a container its limit. */
function memory(): number {
  const limit = process.constrainedMemory();
  return limit > 0 ? Math.min(limit, totalmem()) : totalmem();
}
