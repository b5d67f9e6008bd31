/** ExprText of CUDA sources: the frame of a source, types, literals, vectors of elements, and formulas. */
import { bytesOf, type Dtype, dtypes } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import { type ExprText, type Language, strength } from "../formulaText.ts";
import type { KernelSpec } from "../kernelSpec.ts";

/**
 * Returns a complete source. Entry points of the body are `extern "C" __global__` and keep their names; all other declarations are in
 * `namespace <name>_ns`. Sources can be concatenated: the prelude has an include guard.
 */
export function source({ name, dtype }: Pick<KernelSpec, "name" | "dtype">, body: string): string {
  const helpers = new Set(Object.values(dtype).flatMap((type) => dtypes[type].cuda?.helpers ?? []));
  const more = [...helpers].map((file) => `${render(file, {})}\n`).join("");
  return `${render("cuda/prelude.cuh", { guard: "RANKC_PRELUDE" })}\n${more}namespace ${name}_ns {\n\n${body}\n}  // namespace ${name}_ns\n`;
}

/** Returns the widest vector in elements: 16 bytes of the narrowest type. */
export const widestVector = (types: readonly Dtype[]): number => 16 / Math.min(...types.map((t) => bytesOf[t]));

/** Returns the vector width in elements: the widest vector, halved until it divides the row. */
export function vectorOf(row: number, types: readonly Dtype[]): number {
  let width = widestVector(types);
  while (row % width !== 0) width /= 2;
  return width;
}

/** Returns a number as a CUDA f32 literal. */
export function f32(x: number): string {
  const text = String(Math.fround(x));
  return /[.e]/.test(text) ? `${text}f` : `${text}.0f`;
}

/** How the elements of a row are divided among threads. */
export interface RowShares {
  /** Elements per memory access. */
  readonly vector: number;
  /** Threads that share a row: a power of two. */
  readonly lanes: number;
  /** Vectors per thread. */
  readonly items: number;
  /** Threads per block: those of one row, or of several rows. */
  readonly threads: number;
}
/** Divides a row. Up to 32 threads hold one vector each; longer rows have up to `most` vectors a thread. */
export function shareRow(width: number, vector: number, most: number): RowShares {
  const vectors = width / vector;
  const lanes = Math.min(1024, 2 ** Math.ceil(Math.log2(vectors <= 32 ? vectors : Math.max(32, vectors / most))));
  return { vector, lanes, items: Math.ceil(vectors / lanes), threads: lanes > 32 ? lanes : 256 };
}

const functions = {
  exp: "fastExp",
  log: "logf",
  log1p: "log1pf",
  sqrt: "sqrtf",
  abs: "fabsf",
  max: "fmaxf",
  min: "fminf",
  sigmoid: "sigmoid",
  erf: "erff",
} as const;

/** CUDA as a language of formulas. */
export const cuda: Language = {
  vectors: false,
  reciprocals: true,
  literal: f32,
  declare: (name, value) => `const float ${name} = ${value};`,
  rounding: {
    product: (a, b) => atom(`__fmul_rn(${a.text}, ${b.text})`),
    fused: (a, b, c) => atom(`fmaf(${a.text}, ${b.text}, ${c.text})`),
    approxReciprocal: (b) => atom(`fastReciprocal(${b.text})`),
  },
  call(fn, args) {
    const [a = zero, b = zero] = args;
    const of = (text: string, own: ExprText["strength"]): ExprText => ({ text, strength: own, isVector: false });
    if (fn === "approxDiv") return of(`${a.strength < strength.mul ? `(${a.text})` : a.text} * fastReciprocal(${b.text})`, strength.mul);
    // for a base near 1 the difference would lose digits
    if (fn === "oneMinusPower") return of(`-expm1f(${b.text} * ${a.text})`, strength.unary);
    return of(`${functions[fn]}(${args.map((x) => x.text).join(", ")})`, strength.atom);
  },
  // compilers may assume finite floats, so the bits are tested
  test(kind, [a = zero, b = zero]) {
    if (kind === "finite") return `(__float_as_uint(${a.text}) & 0x7f800000u) != 0x7f800000u`;
    return `${a.text} ${kind === "greater" ? ">" : "=="} ${b.text}`;
  },
  select: (test, yes, no) => ({
    text: `${test} ? ${yes.strength === strength.select ? `(${yes.text})` : yes.text} : ${no.text}`,
    strength: strength.select,
    isVector: false,
  }),
};
const atom = (text: string): ExprText => ({ text, strength: strength.atom, isVector: false });
const zero: ExprText = { text: "0.0f", strength: strength.atom, isVector: false };
