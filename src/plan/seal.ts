/**
 * The plan as a file: canonical JSON (RFC 8785), so that equal plans have equal bytes, with a digest per section, so that a change is
 * located. `parsePlan` (read.ts) returns exactly the plan that `printPlan` wrote.
 */
import { createHash } from "node:crypto";
import { FORMAT_VERSION } from "../../schemas/formatVersion.ts";
import type { Plan, Sections } from "../../schemas/plan.ts";
import { canonical } from "./canonical.ts";

/** Sections that have a digest. */
export const sections = ["job", "mesh", "programs", "memory", "kernels", "toolchain"] as const satisfies readonly (keyof Sections)[];
/** SHA-256 of each section, and of all together. */
export type Digests = Plan["digests"];

/** Builds a plan from its sections: adds format version and digests. */
export function sealPlan(parts: Sections): Plan {
  const texts = Object.fromEntries(sections.map((name) => [name, canonical(parts[name])]));
  const digests = Object.fromEntries(sections.map((name) => [name, sha256(texts[name]!)])) as Digests;
  const plan: Plan = { ...parts, format_version: FORMAT_VERSION, digests: { ...digests, plan: overall(FORMAT_VERSION, digests) } };
  const { format_version } = plan;
  sealed.set(plan, joined(Object.entries({ ...texts, format_version: canonical(format_version), digests: canonical(plan.digests) })));
  return plan;
}

/** The compiled binary of a kernel: file name below kernels/, and content. */
export interface Cubin {
  readonly file: string;
  readonly bytes: Uint8Array;
}
/** Returns the plan with the digests of cubins, which `cubins` maps by kernel id, sealed again. */
export function sealCubins({ format_version: _, digests: __, ...parts }: Plan, cubins: ReadonlyMap<string, Cubin>): Plan {
  const kernels = parts.kernels.map((kernel) => {
    const cubin = cubins.get(kernel.id);
    return cubin ? { ...kernel, cubin: { file: cubin.file, sha256: sha256(cubin.bytes) } } : kernel;
  });
  return sealPlan({ ...parts, kernels });
}

/** Cached texts of plans sealed in this process: plans are large and usually printed right after sealing. */
const sealed = new WeakMap<Plan, string>();

/** Returns the plan of a text that `printPlan` wrote, without checks. For texts that this process or its cache wrote. */
export function readSealed(text: string): Plan {
  const plan: Plan = JSON.parse(text);
  sealed.set(plan, text);
  return plan;
}

/** Returns the text of a plan file. */
export const printPlan = (plan: Plan): string =>
  sealed.get(plan) ?? joined(Object.entries(plan).map(([name, value]) => [name, canonical(value)] as const));

/** Joins the canonical texts of the top-level keys to the text of a plan. */
export function joined(parts: readonly (readonly [name: string, text: string])[]): string {
  const sorted = [...parts].sort(([a], [b]) => (a < b ? -1 : 1));
  return `{${sorted.map(([name, text]) => `${JSON.stringify(name)}:${text}`).join(",")}}\n`;
}
/** Returns the SHA-256 in hexadecimal. */
export const sha256 = (content: string | Uint8Array): string => createHash("sha256").update(content).digest("hex");

/** Returns the digest over all section digests and the format version, so that a changed version is detected too. */
export function overall(version: string, digests: Digests): string {
  return sha256(canonical({ format_version: version, ...Object.fromEntries(sections.map((name) => [name, digests[name]])) }));
}
