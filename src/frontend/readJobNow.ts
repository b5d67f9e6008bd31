/** Reads a job at once, with the compiler loaded. `readJobWith` loads it when a job needs it. */
import type { Device } from "../../schemas/devices.ts";
import { cpu, type Target } from "../codegen/targets.ts";
import { memoryFindings } from "../rules/all.ts";
import { autoFinding, autoKeysIn } from "./auto.ts";
import type { JobFiles } from "./jobFiles.ts";
import { type JobRead, readQuickly } from "./readJob.ts";

const unresolved = {
  found: "this way of reading a job does not search",
  fix: "call readJobAuto of the library, which chooses the values of auto, or write those that rankc check --print prints",
};

/** Returns the target of a device, whose kernel scratch rule C510 counts. */
export type TargetOf = (device: Device) => Target;

/** Reads a job and applies all rules. User errors are findings; it throws a Trouble only if an overlay cannot be read. `files`: how the files beside the job are found. */
export function readJob(
  text: string,
  file: string,
  sets: readonly string[] = [],
  targetOf: TargetOf = () => cpu,
  files?: JobFiles,
): JobRead {
  const read = readQuickly(text, file, sets, files);
  const auto = autoKeysIn(read.source);
  if (auto.length > 0) return { ...read, findings: [...read.findings, autoFinding(read.source, auto, unresolved)] };
  return read.job ? { ...read, findings: [...read.findings, ...memoryFindings(read.job, read.source, targetOf)] } : read;
}
