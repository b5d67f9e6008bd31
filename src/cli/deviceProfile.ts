/** The device profile that an option of a command names. */

import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { packageProfile, profileNames } from "../analysis/estimate/profiles.ts";

/** Returns the profile that `named` names, by its name in the package or as a file; without a name that of the device, or undefined if it has none. */
export async function profileFor(device: string, named?: string): Promise<DeviceProfile | undefined> {
  if (named === undefined) return packageProfile(device);
  const found = packageProfile(named);
  if (found) return found;
  if (!/[\\/]|\.json$/.test(named))
    throw new Trouble(`there is no device profile ${named}`, `write one of ${profileNames.join(", ")}, or the file of a profile`);
  const [{ parseProfile }, { readProfileFile }] = await Promise.all([
    import("../analysis/estimate/profileFile.ts"),
    import("./inputFiles.ts"),
  ]);
  return parseProfile(readProfileFile(named), named);
}
