/** The hardware of a device profile: its own, or that of the table of devices. */
import type { DeviceProfile } from "../../../schemas/deviceProfile.ts";
import { type DeviceRow, deviceNames, deviceOf } from "../../../schemas/devices.ts";
import { invariant } from "../../ops/op.ts";

/** What the laws need of a device: bytes/s, FLOP/s by type, multiprocessors. */
export interface Hardware {
  readonly memory: number;
  readonly bandwidth: number;
  readonly multiprocessors: number;
  readonly peak: Readonly<Record<"f32" | "bf16" | "f16" | "f8e4m3", number>>;
}

/** Returns the hardware of a profile: its own, or the row of its device. */
export function hardwareOf({ device, hardware }: Pick<DeviceProfile, "device" | "hardware">): Hardware {
  if (hardware) {
    const { f32, bf16, f8e4m3 = bf16 } = hardware.peak;
    return { ...hardware, peak: { f32, bf16, f16: bf16, f8e4m3 } };
  }
  const name = deviceNames.find((known) => known === device);
  invariant(name !== undefined, () => `the profile names a device ${device} without its hardware`);
  const { memory, bandwidth, multiprocessors, peak }: DeviceRow = deviceOf(name);
  const f32 = peak.f32 ?? 1;
  const bf16 = peak.bf16 ?? f32;
  return {
    ...{ memory, bandwidth, multiprocessors },
    peak: { f32, bf16, f16: peak.f16 ?? bf16, f8e4m3: peak.f8e4m3 ?? bf16 },
  };
}
