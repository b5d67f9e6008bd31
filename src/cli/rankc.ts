#!/usr/bin/env node
/** The entry of the bundle: it prepares V8 for a short command before the command line is loaded. A checkout starts main.ts. */
import { setFlagsFromString } from "node:v8";
import { cacheCode } from "./codeCache.ts";

/** Commands that may compute for long, and need optimized code. */
const long: readonly (string | undefined)[] = ["run", "eval", "data", "serve"];

if (!long.includes(process.argv[2])) {
  // Node 20 optimizes functions so early that a command of a second spends a fifth of its CPU time on it: eight times the calls of the default
  if (process.versions.v8.startsWith("11.")) setFlagsFromString("--interrupt-budget=1000000");
  // V8 keeps code per set of flags
  cacheCode();
}
void import("./main.ts");
