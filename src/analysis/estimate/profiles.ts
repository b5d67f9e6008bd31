/** The device profiles of the package: schemas/devices/*.json. */
import { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import { deviceNames, deviceOf } from "../../../schemas/devices.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { readPackageFile } from "../../packageFile.ts";

/** The names of the profiles of the package: devices with the kernels of rankc, and with other software. */
export const profileNames: readonly string[] = [
  ...deviceNames.filter((name) => deviceOf(name).links !== null),
  ...["h100-80gb.megatron", "h100-80gb.megatron-fp8", "b200-192gb.megatron"],
];

const known = new Map<string, DeviceProfile>();

/** Returns a profile of the package by its name; undefined if there is none. */
export function packageProfile(name: string): DeviceProfile | undefined {
  if (!profileNames.includes(name)) return undefined;
  const before = known.get(name);
  if (before) return before;
  const profile = parseProfile(readPackageFile(`schemas/devices/${name}.json`), `schemas/devices/${name}.json`);
  known.set(name, profile);
  return profile;
}

/** Reads the text of a profile. Throws a Trouble that names the first key that is wrong. */
export function parseProfile(text: string, file: string): DeviceProfile {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Trouble(
      `${file} is not JSON: ${error instanceof Error ? error.message : String(error)}`,
      "write a profile with rankc calibrate",
    );
  }
  const read = DeviceProfile.safeParse(value);
  if (read.success) {
    const { device, hardware } = read.data;
    if (hardware || deviceNames.some((name) => name === device)) return read.data;
    throw new Trouble(
      `${file} names a device ${device} that rankc does not know, without its hardware`,
      `write hardware: {memory, bandwidth, multiprocessors, peak}, or one of ${deviceNames.join(", ")}`,
    );
  }
  const [issue] = read.error.issues;
  throw new Trouble(
    `${file} is not a device profile: ${issue?.path.join(".") || "the file"}: ${issue?.message ?? "unknown"}`,
    "compare it with schemas/device-profile.schema.json, or write one with rankc calibrate",
  );
}
