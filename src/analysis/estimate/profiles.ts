/** The device profiles of the package: schemas/devices/*.json. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import { deviceNames, deviceOf } from "../../../schemas/devices.ts";
import { readPackageFile } from "../../packageFile.ts";

/** The names of the profiles of the package: devices with the kernels of rankc, and with other software. */
export const profileNames: readonly string[] = [
  ...deviceNames.filter((name) => deviceOf(name).links !== null),
  ...["h100-80gb.megatron", "h100-80gb.megatron-fp8", "b200-192gb.megatron"],
];

const known = new Map<string, DeviceProfile>();

/** Returns a profile of the package by its name; undefined if there is none. A test holds that the files fit the schema and write every key. */
export function packageProfile(name: string): DeviceProfile | undefined {
  if (!profileNames.includes(name)) return undefined;
  const before = known.get(name);
  if (before) return before;
  const profile: DeviceProfile = JSON.parse(readPackageFile(`schemas/devices/${name}.json`));
  known.set(name, profile);
  return profile;
}
