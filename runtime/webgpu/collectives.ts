/**
 * Kernels of collectives among ranks that share a device; they depend on the plan's groups. Sums and maxima are computed in f32, in the
 * order of the sources.
 */
import { type Dtype, wgslDirectives, wgslType } from "../../schemas/dtypes.ts";
import type { ShaderSource } from "./pipelines.ts";

/** The operation of a reduction. */
export type Reduction = "sum" | "max";
const THREADS = 256;
/** Every adapter allows 8 storage buffers; one is the result. */
export const MOST_SOURCES = 7;
const LARGEST_GRID = 65535;

/** A reduction kernel. */
export interface Reduce {
  readonly reduction: Reduction;
  readonly dtype: Dtype;
  readonly sources: number;
  /** Whether the result accumulates onto its current value. */
  readonly more: boolean;
}

const buffer = (binding: number, name: string, type: string): string =>
  `@group(0) @binding(${binding}) var<storage, read_write> ${name}: array<${type}>;\n`;
const entry = `@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
  let i = (group.y * groups.x + group.x) * ${THREADS}u + lane;
`;

/** total[i] = the reduction of x0[i], x1[i], …; total is f32 and as long as its binding. */
export function reduceSource({ reduction, dtype, sources, more }: Reduce): ShaderSource {
  const values = Array.from({ length: sources }, (_, s) => `f32(x${s}[i])`);
  const all = more ? ["total[i]", ...values] : values;
  const combined = all.reduce((left, right) => (reduction === "sum" ? `${left} + ${right}` : `max(${left}, ${right})`));
  const code = `${wgslDirectives([dtype])}${values.map((_, s) => buffer(s, `x${s}`, wgslType(dtype))).join("")}${buffer(sources, "total", "f32")}
${entry}  if (i >= arrayLength(&total)) { return; }
  total[i] = ${combined};
}
`;
  return {
    name: `the ${reduction} of ${sources} ranks in ${dtype}`,
    code,
    entries: [{ entry: "main", buffers: sources + 1, uniform: false }],
  };
}

/** Returns the kernel to[place.y + i] = from[place.x + i], i < place.z: copies 16-bit blocks that are not word-aligned, and converts types. */
export function placeSource(from: Dtype, to: Dtype): ShaderSource {
  const code = `${wgslDirectives([from, to])}${buffer(0, "source", wgslType(from))}${buffer(1, "result", wgslType(to))}@group(0) @binding(2) var<uniform> place: vec4u;

${entry}  if (i >= place.z) { return; }
  result[place.y + i] = ${wgslType(to)}(source[place.x + i]);
}
`;
  return { name: `a block of ${from} as ${to}`, code, entries: [{ entry: "main", buffers: 2, uniform: true }] };
}

/** Returns the workgroup grid of a number of elements, in two dims if one is too long. */
export function gridOf(elements: number): [number, number, number] {
  const groups = Math.ceil(elements / THREADS);
  const rows = Math.max(1, Math.ceil(groups / LARGEST_GRID));
  return [Math.ceil(groups / rows), rows, 1];
}
