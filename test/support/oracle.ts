/** What Megatron Core computed, as it lies in fixtures/oracles. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { afterAll, expect } from "vitest";
import { fixture } from "./job.ts";

export type Named = { readonly id: string };
export const oracle = <T>(name: string): T => JSON.parse(readFileSync(fixture(`oracles/${name}.json`), "utf8"));
export const byId = <T extends Named>(cases: readonly T[]) => cases.map((c) => [c.id, c] as const);

/** A safetensors file unpacked from its four byte planes (exponents next to exponents compress; mantissas do not). */
export function unpacked(name: string): string {
  const folder = mkdtempSync(join(tmpdir(), "rankc-oracles-"));
  afterAll(() => rmSync(folder, { recursive: true }));
  const planes = gunzipSync(readFileSync(fixture(`oracles/${name}.gz`)));
  const quarter = planes.length / 4;
  const path = join(folder, `${name}.safetensors`);
  writeFileSync(
    path,
    planes.map((_, i) => planes[(i % 4) * quarter + (i >> 2)]!),
  );
  return path;
}

export const near = (got: number, want: number, relative: number, what: string, absolute = 0) =>
  expect(Math.abs(got - want) / (relative * Math.abs(want) + absolute), `${what}: ${got} where Megatron has ${want}`).toBeLessThan(1);
