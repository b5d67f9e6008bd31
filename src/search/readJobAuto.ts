/** Reads a job whose keys may be `auto`, and chooses their values. */
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { packageProfile } from "../analysis/estimate/profiles.ts";
import { loadDeviceTargets } from "../codegen/targets.ts";
import type { JobFiles } from "../frontend/jobFiles.ts";
import { type JobRead, readJobWith } from "../frontend/readJob.ts";
import { chooseAuto } from "./chooseAuto.ts";

/** What the choice needs beside the job. */
export interface AutoOptions {
  /** How the files beside the job are found. */
  readonly files?: JobFiles;
  /** Default: that of cluster.device. */
  readonly profile?: DeviceProfile;
  /** Receives a line for each estimated choice. */
  readonly onProgress?: (line: string) => void;
}

/**
 * Reads a job as `readJob` does, and chooses the values of keys that it leaves as `auto`: those of the fastest plan that fits. The result has the chosen
 * values in `job`, and in `auto` what was chosen; if nothing can be chosen, a finding says why.
 */
export function readJobAuto(
  text: string,
  file: string,
  sets: readonly string[] = [],
  { files, profile, onProgress }: AutoOptions = {},
): Promise<JobRead> {
  return readJobWith(
    {
      load: loadDeviceTargets,
      chooseAuto: async (request) => {
        const { device } = request.job.cluster;
        const target = (await loadDeviceTargets())(device);
        return chooseAuto(request, { profile: profile ?? packageProfile(device), target, ...(onProgress && { onProgress }) });
      },
    },
    text,
    file,
    sets,
    files,
  );
}
