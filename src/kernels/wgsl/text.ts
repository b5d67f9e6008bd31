/**
 * What all WGSL sources share: how an entry's arguments are bound, how a grid is folded, and how a dtype is called. The
 * text of the bindings and the launch that fills them come from one list, so they cannot disagree.
 */
import type { Dtype, Launch } from "../../../schemas/plan.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { invariant } from "../../ops/op.ts";
import type { Made, Use } from "../kernel.ts";

/** A storage buffer of an entry: what the launch binds, the variable it is in the source, and the type of its elements. */
export interface Binding {
  /** As in `Launch.args`: an operand, `rows`, `needed`, `scratch+N`. */
  readonly arg: string;
  /** The variable; `arg` if not said. Entries of one source may share a variable only at the same place. */
  readonly name?: string;
  /** `f32`, `vec4<f16>`, `atomic<u32>`. */
  readonly type: string;
}

export interface Entry {
  readonly entry: string;
  /** How many workgroups: a number is folded (see `fold`). */
  readonly grid: number | readonly [number, number, number];
  readonly threads: number;
  readonly buffers: readonly Binding[];
  /** Dims whose first global index it is told, in the components of the uniform `start` (or as `uniform` calls it): `start.x`, `start.y`, … */
  readonly starts?: readonly string[];
  readonly uniform?: string;
}

/** WebGPU's default limits, which the profile `baseline` keeps. */
const MAX_GROUPS = 65535;
const MAX_BUFFERS = 8;
const MAX_THREADS = 256;

/** The type of an element, as WGSL calls it. Throws a Trouble for bf16, which has no name there. */
export function scalar(dtype: Dtype): "f32" | "f16" | "i32" {
  if (dtype === "bf16")
    throw new Trouble("the job trains in bf16, which WebGPU does not have", "write train.precision: fp32, or compile for cuda");
  return dtype;
}

/** `f32`, or `vec4<f32>` where `width` is 4. */
export const vector = (type: string, width: number): string => (width === 1 ? type : `vec${width}<${type}>`);

/** The widest vector (1, 2 or 4 elements) that divides all of these. */
export const widthOf = (...sizes: readonly number[]): 1 | 2 | 4 => ([4, 2] as const).find((w) => sizes.every((n) => n % w === 0)) ?? 1;

/** What a source with such operands begins with. */
export const header = (dtypes: Readonly<Record<string, Dtype>>): string => (Object.values(dtypes).includes("f16") ? "enable f16;\n" : "");

/** A kernel: its bindings, then its functions as templates give them. Launches follow the order of the entries. */
export const kernel = (use: Use, entries: readonly Entry[], texts: readonly string[], scratch = 0): Made => ({
  source: [`${header(use.dtype)}${bindings(...entries)}\n`, ...texts].join("\n"),
  launches: entries.map(launch),
  scratch,
});

/**
 * A grid of at least `groups` workgroups within the limit of each dimension, and the index of one, given its
 * `@builtin(workgroup_id) group`. Indices may go past `groups`: entries check.
 */
export function fold(groups: number): { readonly grid: [number, number, number]; readonly index: string } {
  const high = Math.max(1, Math.ceil(groups / MAX_GROUPS));
  const wide = Math.max(1, Math.ceil(groups / high));
  return { grid: [wide, high, 1], index: high === 1 ? "group.x" : `(group.y * ${wide}u + group.x)` };
}

/** The declarations of all bindings of these entries, each once. */
export function bindings(...entries: readonly Entry[]): string {
  const lines = new Map<string, string>();
  const declare = (name: string, line: string) => {
    invariant((lines.get(name) ?? line) === line, `two bindings are called ${name}: ${line}`);
    lines.set(name, line);
  };
  for (const { buffers, starts, uniform } of entries) {
    for (const [i, { arg, name, type }] of buffers.entries())
      declare(name ?? arg, `@group(0) @binding(${i}) var<storage, read_write> ${name ?? arg}: array<${type}>;`);
    if (starts?.length) declare(uniform ?? "start", `@group(0) @binding(${buffers.length}) var<uniform> ${uniform ?? "start"}: vec4<i32>;`);
  }
  return [...lines.values()].join("\n");
}

/** The launch of an entry. Throws where it would break WebGPU's default limits. */
export function launch({ entry, grid, threads, buffers, starts = [] }: Entry): Launch {
  const size = typeof grid === "number" ? fold(grid).grid : grid;
  invariant(buffers.length <= MAX_BUFFERS && starts.length <= 4, `${entry}: ${buffers.length} buffers`);
  invariant(threads <= MAX_THREADS && Math.max(...size) <= MAX_GROUPS && Math.min(...size) > 0, `${entry}: ${threads} x ${size}`);
  // all of scratch from there on is bound: two such ranges would overlap, which WebGPU forbids
  invariant(buffers.filter((b) => b.arg.startsWith("scratch+")).length <= 1, `${entry}: scratch is bound twice`);
  return { entry, grid: [...size], threads, shared: 0, args: [...buffers.map((b) => b.arg), ...starts.map((d) => `start(${d})`)] };
}

/** A number as a WGSL literal of a float. */
export const float = (x: number): string => (/[.e]/.test(`${x}`) ? `${x}` : `${x}.0`);

/** The sum of a vector's elements. */
export const horizontal = (name: string, width: number): string =>
  width === 1
    ? name
    : `(${["x", "y", "z", "w"]
        .slice(0, width)
        .map((part) => `${name}.${part}`)
        .join(" + ")})`;

/** Invocations that share a row of so many vectors: a power of two, at most a workgroup. */
export function lanesOf(vectors: number, threads = 256): number {
  let lanes = 1;
  while (lanes < threads && lanes < vectors) lanes *= 2;
  return lanes;
}

/** Scratch, in whole steps of its alignment. */
export const scratchBytes = (words: number): number => Math.ceil((4 * words) / 256) * 256;
