/**
 * Helpers of all WGSL sources: bindings, grids and type names. The text of the bindings and the arguments of the launch are made from one
 * list, so that they agree.
 */
import { wgslDirectives, wgslType } from "../../../schemas/dtypes.ts";
import type { Dtype } from "../../../schemas/plan.ts";
import { invariant } from "../../ops/op.ts";
import type { GeneratedKernel, KernelSpec } from "../kernelSpec.ts";
import { attributeOf, type GeneratedLaunch, type scratchStart, startOf } from "../launchArgs.ts";

/** The argument of a launch for a storage buffer. */
type BufferArg = string | typeof scratchStart;

/** A storage buffer of an entry: launch argument, variable in the source, element type. */
export interface Binding {
  /** An operand, `rows`, `needed`, or `scratchStart`. */
  readonly arg: BufferArg;
  /** The variable; default: the name of the buffer. Entries of one source may share a variable only at the same binding. */
  readonly name?: string;
  /** `f32`, `vec4<f16>`, `atomic<u32>`. */
  readonly type: string;
}

export interface EntryPoint {
  readonly entry: string;
  /** How many workgroups: a number is folded (see `fold`). */
  readonly grid: number | readonly [number, number, number];
  readonly threads: number;
  readonly buffers: readonly Binding[];
  /** Dims whose first global index it is told, in the components of the uniform `start` (or as `uniform` calls it): `start.x`, `start.y`, … */
  readonly starts?: readonly string[];
  /** Attributes it is told, in the components of `<uniform>.attr`, a vec4<u32>; starts are then in `<uniform>.start`. */
  readonly attrs?: readonly string[];
  readonly uniform?: string;
}

/** Default limits of WebGPU, which the profile `baseline` requires. */
const MAX_GROUPS = 65535;
const MAX_BUFFERS = 8;
const MAX_THREADS = 256;

/** Returns the WGSL type of an element. Throws a Trouble for a type that WGSL does not have. */
export const scalar = wgslType;

/** Returns the vector type of a width: `f32`, or `vec4<f32>` for width 4. */
export const vector = (type: string, width: number): string => (width === 1 ? type : `vec${width}<${type}>`);

/** Returns the largest vector width (1, 2 or 4) that divides all sizes. */
export const widthOf = (...sizes: readonly number[]): 1 | 2 | 4 => ([4, 2] as const).find((w) => sizes.every((n) => n % w === 0)) ?? 1;

/** Returns the directives of a source with these operands. */
export const header = (dtypes: Readonly<Record<string, Dtype>>): string => wgslDirectives(Object.values(dtypes));

/** A kernel: its bindings, then its functions as templates give them. Launches follow the order of the entries. */
export function kernel(spec: KernelSpec, entries: readonly EntryPoint[], texts: readonly string[], scratch = 0): GeneratedKernel {
  const { bindings, launches } = bound(entries);
  return { source: [`${header(spec.dtype)}${bindings}\n`, ...texts].join("\n"), launches, scratch };
}

/**
 * A grid of at least `groups` workgroups within the limit of each dimension, and the index of one, given its
 * `@builtin(workgroup_id) group`. Indices may go past `groups`: entries check.
 */
export function foldGrid(groups: number): { readonly grid: [number, number, number]; readonly index: string } {
  const high = Math.max(1, Math.ceil(groups / MAX_GROUPS));
  const wide = Math.max(1, Math.ceil(groups / high));
  return { grid: [wide, high, 1], index: high === 1 ? "group.x" : `(group.y * ${wide}u + group.x)` };
}

/**
 * The declarations of all bindings of these entries, and their launches. Entries bind the same buffers in the same places
 * where the limits allow, each also those that only others use: one bind group then serves all launches of a kernel, and
 * setting another would cost the host about a third of a launch.
 */
export function bound(entries: readonly EntryPoint[]): { readonly bindings: string; readonly launches: GeneratedLaunch[] } {
  const all = [...new Set(entries.flatMap(({ buffers }) => buffers.map(({ arg }) => arg)))];
  // all entries share the longest start list; shorter lists must be a prefix of it so that offsets agree
  const [starts, attrs] = [longest(entries.map((e) => e.starts ?? [])), longest(entries.map((e) => e.attrs ?? []))];
  const within = (some: readonly string[] = [], every: readonly string[]) => some.every((name, i) => name === every[i]);
  const agree = entries.every((e) => within(e.starts, starts) && within(e.attrs, attrs));
  const together = agree && all.length <= MAX_BUFFERS && scratches(all) <= 1;
  const lines = new Map<string, string>();
  const declare = (name: string, line: string) => {
    invariant((lines.get(name) ?? line) === line, `two bindings are called ${name}: ${line}`);
    lines.set(name, line);
  };
  const launches = entries.map((e) => {
    const own = e.buffers.map(({ arg }) => arg);
    invariant(new Set(own).size === own.length, `${e.entry} binds a buffer twice: ${own.map(nameOf)}`);
    const args = together ? all : own;
    for (const { arg, name = nameOf(arg), type } of e.buffers)
      declare(name, `@group(0) @binding(${args.indexOf(arg)}) var<storage, read_write> ${name}: array<${type}>;`);
    const { uniform = "start" } = e;
    if (e.attrs?.length) declare("Told", "struct Told { start: vec4<i32>, attr: vec4<u32> }");
    if (e.attrs?.length || e.starts?.length)
      declare(uniform, `@group(0) @binding(${args.length}) var<uniform> ${uniform}: ${e.attrs?.length ? "Told" : "vec4<i32>"};`);
    return launch(e, args, together ? { starts, attrs } : { starts: e.starts ?? [], attrs: e.attrs ?? [] });
  });
  return { bindings: [...lines.values()].join("\n"), launches };
}

const nameOf = (arg: BufferArg): string => (typeof arg === "string" ? arg : arg.kind);
const longest = (lists: readonly (readonly string[])[]): readonly string[] => lists.reduce((a, b) => (b.length > a.length ? b : a), []);

/** Returns the launch of an entry. Throws a BrokenInvariant if it exceeds the default limits of WebGPU. */
function launch(
  { entry, grid, threads }: EntryPoint,
  args: readonly BufferArg[],
  { starts, attrs }: { readonly starts: readonly string[]; readonly attrs: readonly string[] },
): GeneratedLaunch {
  const size = typeof grid === "number" ? foldGrid(grid).grid : grid;
  invariant(args.length <= MAX_BUFFERS && starts.length <= 4 && attrs.length <= 4, `${entry}: ${args.length} buffers`);
  invariant(threads <= MAX_THREADS && Math.max(...size) <= MAX_GROUPS && Math.min(...size) > 0, `${entry}: ${threads} x ${size}`);
  // a scratch binding extends to the end of scratch: two of them would overlap, which WebGPU forbids
  invariant(scratches(args) <= 1, `${entry}: scratch is bound twice`);
  return {
    entry,
    grid: [...size],
    threads,
    shared: 0,
    args: [...args, ...starts.map(startOf), ...attrs.map(attributeOf)],
  };
}
const scratches = (args: readonly BufferArg[]): number => args.filter((arg) => typeof arg !== "string").length;

/** Returns a number as a WGSL float literal. */
export const float = (x: number): string => (/[.e]/.test(`${x}`) ? `${x}` : `${x}.0`);

/** Returns an expression for the sum of the elements of a vector. */
export const horizontal = (name: string, width: number): string =>
  width === 1
    ? name
    : `(${["x", "y", "z", "w"]
        .slice(0, width)
        .map((part) => `${name}.${part}`)
        .join(" + ")})`;

/** Returns the number of invocations that share a row of `vectors` vectors: a power of two, at most `threads`. */
export function lanesOf(vectors: number, threads = 256): number {
  let lanes = 1;
  while (lanes < threads && lanes < vectors) lanes *= 2;
  return lanes;
}

/** Scratch, in whole steps of its alignment. */
export const scratchBytes = (words: number): number => Math.ceil((4 * words) / 256) * 256;
