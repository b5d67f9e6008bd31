/** All launches that Megatron refuses, by subject. */
import type { Importing } from "../job/importing.ts";
import { biases, experts } from "./experts.ts";
import { optimizer, precision } from "./numbers.ts";
import { cudaGraphs, memory, overlap, stages } from "./pipeline.ts";
import { launchOf, type Refusal } from "./refusal.ts";
import { layers, run } from "./run.ts";

/** All of them, in the order in which they are reported. */
const refusals: readonly Refusal[] = [
  ...[...run, ...layers, ...stages, ...memory, ...overlap],
  ...[...cudaGraphs, ...biases, ...experts, ...precision, ...optimizer],
];

/** Reports the launches that Megatron refuses. `data`: the data degree. */
export function checkRefusals({ args, job }: Importing, data: number): void {
  let isKnown = true;
  const launch = launchOf(args, data, () => {
    isKnown = false;
  });
  for (const { given, otherwise = `no --${given[0]}`, when, why, fix } of refusals) {
    isKnown = true;
    // unknown values are reported where they are read
    if (when(launch) && isKnown) job.reject(launch.shown(...given) || otherwise, why, fix);
  }
}
