/**
 * Helpers of all WGSL sources: bindings, grids and type names. The text of the bindings and the arguments of the launch are made from one
 * list, so that they agree.
 */
import { type Dtype, wgslDirectives, wgslType } from "../../../schemas/dtypes.ts";
import { invariant } from "../../ops/op.ts";
import { type ExprText, type Language, strength } from "../formulaText.ts";
import type { GeneratedKernel, KernelOperand, KernelSpec } from "../kernelSpec.ts";
import {
  attributeOf,
  type GeneratedLaunch,
  type neededRows,
  type ownBlock,
  type rowIndex,
  type scratchStart,
  startOf,
} from "../launchArgs.ts";

/** The argument of a launch for a storage buffer. */
type BufferArg = string | typeof scratchStart | typeof rowIndex | typeof neededRows;

/** A position at which this rank's part begins: the first global index of a dim, or the first element of a block. */
export type Start = string | typeof ownBlock;

/** A storage buffer of an entry: launch argument, variable in the source, element type. */
export interface Binding {
  /** An operand, `rowIndex`, `neededRows`, or `scratchStart`. */
  readonly arg: BufferArg;
  /** The variable; default: the name of the buffer. Entries of one source may share a variable only at the same binding. */
  readonly name?: string;
  /** `f32`, `vec4<f16>`, `atomic<u32>`. */
  readonly type: string;
}

/** An entry of a shader, and its bindings. */
export interface EntryPoint {
  readonly entry: string;
  /** How many workgroups: a number is folded (see `foldGrid`). */
  readonly grid: number | readonly [number, number, number];
  readonly threads: number;
  readonly buffers: readonly Binding[];
  /** Positions that are passed in the components of the uniform `start` (or of the name `uniform`): `start.x`, `start.y`, … */
  readonly starts?: readonly Start[];
  /** Runtime attributes, in the components of `<uniform>.attr`, a vec4<u32>; starts are then in `<uniform>.start`. */
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

/** Returns the binding of an operand whose elements are read or written as vectors of a width. */
export const bindingOf = ({ name, dtype }: KernelOperand, width = 1, variable = name): Binding => ({
  arg: name,
  name: variable,
  type: vector(scalar(dtype), width),
});

/** Returns a kernel: its bindings, then its functions. Launches follow the order of the entries. */
export function kernel(spec: KernelSpec, entries: readonly EntryPoint[], texts: readonly string[], scratch = 0): GeneratedKernel {
  const { bindings, launches } = bound(entries);
  return { source: [`${header(spec.dtype)}${bindings}\n`, ...texts].join("\n"), launches, scratch };
}

/**
 * Returns a grid of at least `groups` workgroups within the limit of each dimension, and the expression of the index of one from its
 * `@builtin(workgroup_id) group`. Indices may exceed `groups`, so entries check them.
 */
export function foldGrid(groups: number): { readonly grid: [number, number, number]; readonly index: string } {
  const high = Math.max(1, Math.ceil(groups / MAX_GROUPS));
  const wide = Math.max(1, Math.ceil(groups / high));
  return { grid: [wide, high, 1], index: high === 1 ? "group.x" : `(group.y * ${wide}u + group.x)` };
}

/**
 * Returns the declarations of all bindings of these entries, and their launches. If the limits allow, all entries bind the buffers of all,
 * each at the same binding: one bind group then serves all launches of a kernel, and setting another would cost the host about a third of a
 * launch.
 */
export function bound(entries: readonly EntryPoint[]): { readonly bindings: string; readonly launches: GeneratedLaunch[] } {
  const all = [...new Set(entries.flatMap(({ buffers }) => buffers.map(({ arg }) => arg)))];
  // all entries share the longest start list; shorter lists must be a prefix of it so that offsets agree
  const [starts, attrs] = [longest(entries.map((e) => e.starts ?? [])), longest(entries.map((e) => e.attrs ?? []))];
  const within = (some: readonly Start[] = [], every: readonly Start[]) => some.every((name, i) => name === every[i]);
  const agree = entries.every((e) => within(e.starts, starts) && within(e.attrs, attrs));
  const together = agree && all.length <= MAX_BUFFERS && scratches(all) <= 1;
  const lines = new Map<string, string>();
  const declare = (name: string, line: string) => {
    invariant((lines.get(name) ?? line) === line, `two bindings have the name ${name}: ${line}`);
    lines.set(name, line);
  };
  const launches = entries.map((e) => {
    const own = e.buffers.map(({ arg }) => arg);
    invariant(new Set(own).size === own.length, `${e.entry} binds a buffer twice: ${own.map(nameOf)}`);
    const args = together ? all : own;
    for (const { arg, name = nameOf(arg), type } of e.buffers)
      declare(name, `@group(0) @binding(${args.indexOf(arg)}) var<storage, read_write> ${name}: array<${type}>;`);
    const { uniform = "start" } = e;
    if (e.attrs?.length) declare("Uniforms", "struct Uniforms { start: vec4<i32>, attr: vec4<u32> }");
    if (e.attrs?.length || e.starts?.length)
      declare(uniform, `@group(0) @binding(${args.length}) var<uniform> ${uniform}: ${e.attrs?.length ? "Uniforms" : "vec4<i32>"};`);
    return launch(e, args, together ? { starts, attrs } : { starts: e.starts ?? [], attrs: e.attrs ?? [] });
  });
  return { bindings: [...lines.values()].join("\n"), launches };
}

const nameOf = (arg: BufferArg): string => (typeof arg === "string" ? arg : arg.kind);
const longest = <T>(lists: readonly (readonly T[])[]): readonly T[] => lists.reduce((a, b) => (b.length > a.length ? b : a), []);

/** Returns the launch of an entry. Throws a BrokenInvariant if it exceeds the default limits of WebGPU. */
function launch(
  { entry, grid, threads }: EntryPoint,
  args: readonly BufferArg[],
  { starts, attrs }: { readonly starts: readonly Start[]; readonly attrs: readonly string[] },
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
    args: [...args, ...starts.map((start) => (typeof start === "string" ? startOf(start) : start)), ...attrs.map(attributeOf)],
  };
}
const scratches = (args: readonly BufferArg[]): number => args.filter((arg) => typeof arg !== "string" && arg.kind === "scratch").length;

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

/** Returns the bytes of scratch for some 32-bit words, rounded up to the alignment of scratch. */
export const scratchBytes = (words: number): number => Math.ceil((4 * words) / 256) * 256;

const functions = { exp: "exp", log: "log", sqrt: "sqrt", abs: "abs", max: "max", min: "min" } as const;
/** The text of an expression as a vector of type V. */
const lifted = ({ text, isVector }: ExprText): string => (isVector ? text : `V(${text})`);

/** WGSL as a language of formulas: elements have type V, a vector of f32 or f32 itself; other values are f32. */
export const wgsl: Language = {
  vectors: true,
  reciprocals: false,
  literal: float,
  declare: (name, value) => `let ${name} = ${value};`,
  call(fn, args) {
    const isVector = args.some((a) => a.isVector);
    const of = (text: string, own: ExprText["strength"] = strength.atom): ExprText => ({ text, strength: own, isVector });
    const texts = args.map((a) => (isVector ? lifted(a) : a.text));
    switch (fn) {
      case "approxDiv": {
        const [a = "", b = ""] = args.map((x, i) => (x.strength < strength.mul + i ? `(${x.text})` : x.text));
        return of(`${a} / ${b}`, strength.mul);
      }
      case "sigmoid":
        return of(`${isVector ? "sigmoid" : "sigmoid_of"}(${texts.join(", ")})`);
      case "erf":
      case "log1p":
        return of(`${fn}(${args.map(lifted).join(", ")})`);
      case "oneMinusPower":
        return of(
          `one_minus_exp(${args
            .map((x) => (x.strength < strength.mul ? `(${x.text})` : x.text))
            .toReversed()
            .join(" * ")})`,
        );
      default:
        return of(`${functions[fn]}(${texts.join(", ")})`);
    }
  },
  test(kind, args) {
    const texts = args.some((a) => a.isVector) ? args.map(lifted) : args.map((a) => a.text);
    // compilers may assume finite floats, so the bits are tested
    if (kind === "finite") return `(bitcast<u32>(${texts.join()}) & 0x7f800000u) != 0x7f800000u`;
    return texts.join(kind === "greater" ? " > " : " == ");
  },
  select: (test, yes, no, isVector) => ({
    text: `select(${isVector ? lifted(no) : no.text}, ${isVector ? lifted(yes) : yes.text}, ${test})`,
    strength: strength.atom,
    isVector,
  }),
};

/** Functions that formulas call, by name. */
const definitions: Readonly<Record<string, string>> = {
  // the argument is clamped because e^80 is finite; sigmoid(-80) is about 2e-35
  sigmoid: "fn sigmoid(x: V) -> V { return V(1.0) / (V(1.0) + exp(min(-x, V(80.0)))); }",
  sigmoid_of: "fn sigmoid_of(x: f32) -> f32 { return 1.0 / (1.0 + exp(min(-x, 80.0))); }",
  // Abramowitz and Stegun, 7.1.26: the error is at most 1.5e-7
  erf: [
    "fn erf(x: V) -> V {",
    "  let t = V(1.0) / (1.0 + 0.3275911 * abs(x));",
    "  let tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));",
    "  return sign(x) * (1.0 - tail * exp(-x * x));",
    "}",
  ].join("\n"),
  // log(1 + z) for z in [0, 1]; near 0, where 1 + z loses digits, a series whose first omitted term is z^5/5, about 1e-8 of z
  log1p: "fn log1p(z: V) -> V { return select(log(1.0 + z), z * (1.0 - z * (0.5 - z * (V(0.33333333) - z * 0.25))), z < V(0.02)); }",
  // 1 − e^z for z ≤ 0; near 0, where the difference loses digits, a series whose first omitted term is z^8/9!, about 1e-8 of it
  one_minus_exp: [
    "fn one_minus_exp(z: f32) -> f32 {",
    "  if (z < -0.5) {",
    "    return 1.0 - exp(z);",
    "  }",
    `  return ${[8, 7, 6, 5, 4, 3, 2].reduce((inner, n) => `(1.0 + z / ${float(n)} * ${inner})`, "1.0")} * -z;`,
    "}",
  ].join("\n"),
};
/** Returns the definitions of the functions that these statements and expressions call. */
export const definitionsFor = (texts: readonly string[]): string[] =>
  Object.entries(definitions)
    .filter(([name]) => texts.some((t) => new RegExp(`\\b${name}\\(`).test(t)))
    .map(([, text]) => text);
