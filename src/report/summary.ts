/** The summary of a plan that `compile` prints. */
import { devices } from "../../schemas/devices.ts";
import type { Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { bytesText, plural } from "../units.ts";
import { type EstimateView, headLines } from "./estimateView.ts";

/** The summary of a plan. */
export interface Summary {
  readonly name: string;
  readonly digest: string;
  readonly ranks: number;
  readonly roles: number;
  readonly instructions: number;
  /** The maximum over stages, in bytes. */
  readonly peak: { readonly stage: number; readonly bytes: number };
  readonly device: { readonly name: string; readonly bytes: number };
  /** The estimate of a step, in seconds; undefined where the device has no profile. */
  readonly estimate?: Pick<EstimateView, "seconds" | "range" | "tokens_per_second">;
}

/** Summarizes a plan. `estimate`: that of a step, if the device has a profile. */
export function summarize({ job, digests, mesh, programs, memory }: Plan, estimate?: EstimateView): Summary {
  const peak = memory.reduce((most, m) => (m.peak > most.peak ? m : most));
  return {
    name: job.name,
    digest: digests.plan,
    ranks: mesh.world,
    roles: programs.length,
    instructions: programs.reduce((sum, p) => sum + instructionsOf(p).length, 0),
    peak: { stage: peak.stage, bytes: peak.peak },
    device: { name: job.cluster.device, bytes: devices[job.cluster.device].memory },
    ...(estimate && { estimate: { seconds: estimate.seconds, range: estimate.range, tokens_per_second: estimate.tokens_per_second } }),
  };
}

/** Formats a summary as text. `estimate`: that of a step, if the device has a profile. */
export function printSummary({ name, digest, ranks, roles, instructions, peak, device }: Summary, estimate?: EstimateView): string {
  const share = ((100 * peak.bytes) / device.bytes).toFixed(1);
  return [
    `${printable(name)}: ${plural(ranks, "rank")}, ${plural(roles, "role")}, ${plural(instructions, "instruction")}`,
    `peak memory ${bytesText(peak.bytes)} on stage ${peak.stage}, ${share} % of ${device.name} (${bytesText(device.bytes)})`,
    ...(estimate ? headLines(estimate, Infinity) : []),
    `digest ${digest}`,
    "",
  ].join("\n");
}
