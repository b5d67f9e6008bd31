/** Runs before each test file: in the fast tier random draws begin with one seed; the CPU time of the file is kept for the report. */
import { readFileSync } from "node:fs";
import fc from "fast-check";
import { afterAll } from "vitest";
import { isFull } from "./tiers.ts";

declare module "vitest" {
  interface TaskMeta {
    /** Of a test file: CPU time of its process and of the processes that it started and that have ended. */
    cpuSeconds?: number;
  }
}

if (!isFull) fc.configureGlobal({ seed: 1 });

const before = cpuSeconds();
// biome-ignore lint/correctness/noEmptyPattern: vitest reads the names of fixtures from the first argument
afterAll(({}, { meta }) => {
  meta.cpuSeconds = cpuSeconds() - before;
});

/** The CPU time of this process so far; on Linux with that of its children, in steps of 10 ms (proc_pid_stat(5), fields 14 to 17). */
function cpuSeconds(): number {
  if (process.platform !== "linux") return process.cpuUsage().user / 1e6 + process.cpuUsage().system / 1e6;
  const fields = readFileSync("/proc/self/stat", "utf8").split(") ")[1]!.split(" ");
  return fields.slice(11, 15).reduce((sum, ticks) => sum + Number(ticks) / 100, 0);
}
