/** Device profiles that are not of the package: their files are checked with the schema, which takes longer to load than the profiles of the package. */
import { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import { deviceNames } from "../../../schemas/devices.ts";
import { Trouble } from "../../../schemas/trouble.ts";

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
