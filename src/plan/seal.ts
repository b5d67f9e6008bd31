/**
 * The plan as a file: canonical JSON (RFC 8785), so that equal plans are equal bytes, and a digest per section, so that a
 * plan that was changed says where. `readPlan.ts` reads it back: what `parsePlan` returns is exactly what `printPlan` wrote.
 */
import { createHash } from "node:crypto";
import canonicalize from "canonicalize";
import { FORMAT_VERSION, type Plan, type Sections } from "../../schemas/plan.ts";

export const sections = ["job", "mesh", "programs", "memory", "kernels", "toolchain"] as const satisfies readonly (keyof Sections)[];
export type Digests = Plan["digests"];

export function sealPlan(parts: Sections): Plan {
  const texts = Object.fromEntries(sections.map((name) => [name, canonical(parts[name])]));
  const digests = Object.fromEntries(sections.map((name) => [name, sha256(texts[name]!)])) as Digests;
  const plan: Plan = { ...parts, format_version: FORMAT_VERSION, digests: { ...digests, plan: overall(FORMAT_VERSION, digests) } };
  const { format_version } = plan;
  sealed.set(plan, joined(Object.entries({ ...texts, format_version: canonical(format_version), digests: canonical(plan.digests) })));
  return plan;
}

/** A cubin of a kernel: the name of its file below kernels/, and what that holds. */
export interface Cubin {
  readonly file: string;
  readonly bytes: Uint8Array;
}
/** The plan with the cubins of its kernels, by kernel id: their digests are a part of its own. */
export function sealCubins({ format_version: _, digests: __, ...parts }: Plan, cubins: ReadonlyMap<string, Cubin>): Plan {
  const kernels = parts.kernels.map((kernel) => {
    const cubin = cubins.get(kernel.id);
    return cubin ? { ...kernel, cubin: { file: cubin.file, sha256: sha256(cubin.bytes) } } : kernel;
  });
  return sealPlan({ ...parts, kernels });
}

/** Texts of plans sealed in this process: a plan is large, and is written right after. */
const sealed = new WeakMap<Plan, string>();

export const printPlan = (plan: Plan): string =>
  sealed.get(plan) ?? joined(Object.entries(plan).map(([name, value]) => [name, canonical(value)] as const));

export const canonical = (value: unknown): string => canonicalize(value)!;

/** The text of a plan from those of its parts, which need not be walked again. */
export function joined(parts: readonly (readonly [name: string, text: string])[]): string {
  const sorted = [...parts].sort(([a], [b]) => (a < b ? -1 : 1));
  return `{${sorted.map(([name, text]) => `${JSON.stringify(name)}:${text}`).join(",")}}\n`;
}
export const sha256 = (content: string | Uint8Array): string => createHash("sha256").update(content).digest("hex");

/** The version is sealed too: a flipped minor would otherwise pass. */
export function overall(version: string, digests: Digests): string {
  return sha256(canonical({ format_version: version, ...Object.fromEntries(sections.map((name) => [name, digests[name]])) }));
}
