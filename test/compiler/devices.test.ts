/** The table of devices: targets exist, and profiles compare with the peak of the operands' type. */
import { expect, test } from "vitest";
import { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { type Device, deviceNames, deviceOf } from "../../schemas/devices.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { hardwareOf } from "../../src/analysis/estimate/hardware.ts";
import { parseProfile } from "../../src/analysis/estimate/profileFile.ts";
import { packageProfile, profileNames } from "../../src/analysis/estimate/profiles.ts";
import { targetNames } from "../../src/codegen/targetNames.ts";
import { compile } from "../../src/compile.ts";
import { readPackageFile } from "../../src/packageFile.ts";
import { profileRows } from "../../src/report/profile.ts";
import { jobOf } from "../support/job.ts";

test("the target of each device is a value of --target, and f32 is never faster than bf16", () => {
  for (const name of deviceNames) {
    const { target, peak } = deviceOf(name);
    expect(targetNames, name).toContain(target);
    expect(peak.f32, name).toBeLessThanOrEqual(peak.bf16 ?? 0);
  }
});

test("each device with links has a profile that names the sources of its figures; its links are those of the device", () => {
  expect(profileNames.length).toBeGreaterThan(9);
  for (const name of profileNames) {
    const profile = packageProfile(name)!;
    const row = deviceOf(profile.device as Device);
    expect(profile.name).toBe(name);
    expect(profile.links.host.bandwidth, name).toBe(row.links!.host);
    expect(profile.links.network.bandwidth, name).toBe(row.links!.network);
    for (const rows of Object.values(profile.links.host.tables))
      for (const { busbw } of rows) expect(busbw.map(([bytes]) => bytes)).toEqual(busbw.map(([bytes]) => bytes).sort((a, b) => a - b));
  }
});

test("the profiles of the package fit the schema and write every key, so that reading them needs no schema", () => {
  for (const name of profileNames) {
    const written: unknown = JSON.parse(readPackageFile(`schemas/devices/${name}.json`));
    expect(DeviceProfile.parse(written), name).toEqual(written);
  }
});

test("a file that is no profile is refused with the key that is wrong", () => {
  const text = JSON.stringify({ ...packageProfile("h100-80gb"), name: "a b" });
  expect(() => parseProfile(text, "own.json")).toThrow(/own.json is not a device profile: name: /);
  expect(() => parseProfile("{", "own.json")).toThrow(/own.json is not JSON/);
  const own = JSON.stringify({ ...packageProfile("h100-80gb"), device: "h20-96gb" });
  expect(() => parseProfile(own, "own.json")).toThrow(/a device h20-96gb that rankc does not know, without its hardware/);
});

test("a described device equals a named one with the same hardware: that of an H100", () => {
  const { memory, bandwidth, multiprocessors, peak } = deviceOf("h100-80gb");
  const hardware = { memory, bandwidth, multiprocessors, peak: { f32: peak.f32!, bf16: peak.bf16!, f8e4m3: peak.f8e4m3! } };
  const own = parseProfile(JSON.stringify({ ...packageProfile("h100-80gb"), device: "own", hardware }), "own.json");
  expect(hardwareOf(own)).toEqual(hardwareOf(packageProfile("h100-80gb")!));
});

test.each(["fp32", "bf16"] as const)("a profile compares the products of a job in %s with the peak of that type", (precision) => {
  const model = { layers: 1, hidden: 1024, heads: 8, vocab: 256, seq: 2048 };
  const train = { steps: 1, micro_batch: 2, precision, optimizer: { lr: 1e-3 } };
  const job = jobOf({ name: "a", model, train, data: { path: "a.txt" }, cluster: { device: "h100-80gb" } });
  const { plan } = compile(job);
  const product = plan.programs.flatMap(instructionsOf).find((i) => i.kind === "compute" && i.op === "gemm");
  expect(product).toBeDefined();
  const id = product?.id ?? "";
  const [row] = profileRows(plan, [{ rank: 0, stream: "compute", id, op: "gemm", begin_us: 0, end_us: 1000 }]);
  const peak = { fp32: 67e12, bf16: 989e12 }[precision];
  expect(row?.of_peak).toBeCloseTo(((row?.tflops ?? 0) * 1e12) / peak, 9);
});
