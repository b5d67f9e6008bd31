/**
 * Formulas of elementwise and per-row ops. An op declares its formula once, as expressions; the CPU reference (formulaCpu.ts), the CUDA
 * kernel and the WGSL kernel (src/codegen/formulaText.ts) are derived from it. The CPU evaluates in double precision, in the order in which
 * the expression is written.
 */
import { invariant } from "./invariant.ts";
import type { Operand } from "./signature.ts";

/** Functions of one or two numbers. */
export type Fn =
  | "add"
  | "sub"
  | "mul"
  | "div"
  | "approxDiv"
  | "max"
  | "min"
  | "neg"
  | "abs"
  | "exp"
  | "log"
  | "log1p"
  | "sqrt"
  | "sigmoid"
  | "erf"
  | "oneMinusPower";

/** A condition on one or two expressions. */
export type Test =
  | { readonly kind: "greater" | "equal"; readonly a: Expr; readonly b: Expr }
  | { readonly kind: "finite"; readonly x: Expr };

/** An expression. Its scope follows from its operands: see `scopeOf`. */
export type Expr =
  | { readonly kind: "operand"; readonly name: string; readonly scope: ValueScope }
  | { readonly kind: "constant"; readonly value: number }
  /** The global index of the element along the last dim of a row; kernels have it in reductions that read one operand. */
  | { readonly kind: "column" }
  /** A value that kernels compute once and keep in a variable. */
  | { readonly kind: "variable"; readonly name: string; readonly value: Expr }
  | { readonly kind: "call"; readonly fn: Fn; readonly args: readonly Expr[] }
  | { readonly kind: "select"; readonly test: Test; readonly yes: Expr; readonly no: Expr }
  /** A sum or a maximum over the elements of a row. */
  | { readonly kind: "rowReduce"; readonly name: string; readonly by: "sum" | "max"; readonly term: Expr };

/** The value of a scalar output to which an op adds: the sum of `term` over all elements or rows, times or divided by a constant. */
export interface Total {
  readonly kind: "total";
  readonly term: Expr;
  readonly by: number;
  readonly divides: boolean;
}
/** A result of a formula: an expression per element, or a total. */
export type Result = Expr | Total;
/** Returns whether a result is a total. */
export const isTotal = (r: Result): r is Total => r.kind === "total";

/** How often a value changes: never, per launch, per row, per element. */
export type ValueScope = "constant" | "launch" | "row" | "element";
const scopes: readonly ValueScope[] = ["constant", "launch", "row", "element"];
/** Returns whether scope `a` has fewer elements than scope `b`. */
export const isNarrower = (a: ValueScope, b: ValueScope): boolean => scopes.indexOf(a) < scopes.indexOf(b);
const widest = (of: readonly ValueScope[]): ValueScope => of.reduce((a, b) => (isNarrower(a, b) ? b : a), "constant");

/** Returns the scope of an expression: the widest of its operands; that of a reduction over a row is the row. */
export function scopeOf(e: Expr): ValueScope {
  switch (e.kind) {
    case "operand":
      return e.scope;
    case "constant":
      return "constant";
    case "column":
      return "element";
    case "variable":
      return scopeOf(e.value);
    case "call":
      return widest(e.args.map(scopeOf));
    case "select":
      return widest([...testedBy(e.test), e.yes, e.no].map(scopeOf));
    case "rowReduce":
      return "row";
    default:
      return e satisfies never;
  }
}
/** Returns the expressions that a condition compares. */
const testedBy = (test: Test): readonly Expr[] => (test.kind === "finite" ? [test.x] : [test.a, test.b]);

// -- writing formulas

/** An expression or a constant. */
export type Term = Expr | number;
const expr = (x: Term): Expr => (typeof x === "number" ? { kind: "constant", value: x } : x);
const call = (fn: Fn, ...args: readonly Term[]): Expr => ({ kind: "call", fn, args: args.map(expr) });
/** Applies a function of two numbers from left to right. */
const chain =
  (fn: Fn) =>
  (first: Term, ...rest: readonly Term[]): Expr =>
    rest.reduce<Expr>((a, b) => call(fn, a, b), expr(first));

/** a + b + … */
export const add = chain("add");
/** a · b · … */
export const mul = chain("mul");
/** a − b */
export const sub = (a: Term, b: Term): Expr => call("sub", a, b);
/** a / b. Where b is a constant, or a variable per launch or per row, CUDA multiplies by the reciprocal. */
export const div = (a: Term, b: Term): Expr => call("div", a, b);
/** a / b, for which a kernel may use an approximate reciprocal. */
export const approxDiv = (a: Term, b: Term): Expr => call("approxDiv", a, b);
/** The larger of two. */
export const max = (a: Term, b: Term): Expr => call("max", a, b);
/** The smaller of two. */
export const min = (a: Term, b: Term): Expr => call("min", a, b);
/** −x */
export const neg = (x: Term): Expr => call("neg", x);
/** |x| */
export const abs = (x: Term): Expr => call("abs", x);
/** eˣ */
export const exp = (x: Term): Expr => call("exp", x);
/** ln x */
export const log = (x: Term): Expr => call("log", x);
/** log(1 + x) */
export const log1p = (x: Term): Expr => call("log1p", x);
/** √x */
export const sqrt = (x: Term): Expr => call("sqrt", x);
/** The error function, 2/√π · ∫₀ˣ e^(−t²) dt. */
export const erf = (x: Term): Expr => call("erf", x);
/** 1 / (1 + e⁻ˣ) */
export const sigmoid = (x: Term): Expr => call("sigmoid", x);
/** 1 − base^exponent, for a constant base below 1; kernels compute it without cancellation. */
export const oneMinusPower = (base: number, exponent: Term): Expr => call("oneMinusPower", base, exponent);

/** Names a term, so that it is computed once. */
export const variable = (name: string, value: Term): Expr => ({ kind: "variable", name, value: expr(value) });
/** yes if the test holds, otherwise no. */
export const select = (test: Test, yes: Term, no: Term): Expr => ({ kind: "select", test, yes: expr(yes), no: expr(no) });
/** a > b */
export const greater = (a: Term, b: Term): Test => ({ kind: "greater", a: expr(a), b: expr(b) });
/** a = b */
export const equal = (a: Term, b: Term): Test => ({ kind: "equal", a: expr(a), b: expr(b) });
/** Neither infinite nor NaN. */
export const finite = (x: Term): Test => ({ kind: "finite", x: expr(x) });
/** The global index of the element along the last dim of a row. */
export const column: Expr = { kind: "column" };
/** The sum of a term over a row. */
export const rowSum = (name: string, term: Term): Expr => ({ kind: "rowReduce", name, by: "sum", term: expr(term) });
/** The maximum of a term over a row. */
export const rowMax = (name: string, term: Term): Expr => ({ kind: "rowReduce", name, by: "max", term: expr(term) });
/** Σ eˣ⁻ᵐ over a row, where m is the maximum of the row or near it. */
export const sumOfExponentials = (x: Term, m: Term): Expr => rowSum("sum", exp(sub(x, m)));
/** The sum of `term` times a constant. */
export const total = (term: Term, times = 1): Total => ({ kind: "total", term: expr(term), by: times, divides: false });
/** The sum of `term` divided by a constant. */
export const totalOver = (term: Term, divisor: number): Total => ({ kind: "total", term: expr(term), by: divisor, divides: true });

// -- operands

/** How an operand is indexed: per element, per row, one value, or a table that repeats along the elements. */
export type Access =
  | { readonly kind: "element" | "row" | "launch" }
  /**
   * Element i reads index ⌊i/batch⌋·width + i mod width, where `batch` is the product of these dims and `width` of those. A table without
   * rows serves all elements.
   */
  | { readonly kind: "table"; readonly batch: readonly string[]; readonly width: readonly string[]; readonly hasRows: boolean };

/** How the operands of an op relate to its elements, derived from its signature. */
export interface OperandLayout {
  /** Access of each operand by name. */
  readonly access: ReadonlyMap<string, Access>;
  /** An operand that has all elements. */
  readonly full: Operand;
  /** The dims whose product is the width of a row; none for `...`. */
  readonly rowDims: readonly string[];
}

const dimsOf = (o: Operand): readonly string[] => (o.any ? ["..."] : o.dimSpecs.flatMap((s) => [s.dim, ...s.inner]));
const startsWith = (list: readonly string[], some: readonly string[]): boolean => some.every((d, i) => list[i] === d);

/**
 * Returns the layout of an op. Elements are those of the operand with the most dims; a row is what an operand with fewer, leading dims has
 * one value for, or else the last dim.
 */
export function layoutOf({
  inputs,
  outputs,
}: {
  readonly inputs: readonly Operand[];
  readonly outputs: readonly Operand[];
}): OperandLayout {
  const operands = [...inputs, ...outputs];
  const full = operands.reduce((a, b) => (dimsOf(b).length > dimsOf(a).length ? b : a));
  const all = dimsOf(full);
  let rowAt = Math.max(0, all.length - 1);
  const access = new Map(
    operands.map((o): [string, Access] => {
      const dims = dimsOf(o);
      if (dims.length === all.length) return [o.name, { kind: "element" }];
      if (dims.length === 0) return [o.name, { kind: "launch" }];
      if (startsWith(all, dims)) {
        rowAt = dims.length;
        return [o.name, { kind: "row" }];
      }
      const shared = dims.findIndex((d, i) => d !== all[i]);
      return [o.name, { kind: "table", batch: all.slice(shared), width: dims.slice(shared), hasRows: shared > 0 }];
    }),
  );
  return { access, full, rowDims: full.any ? [] : all.slice(rowAt) };
}

/** Returns the expression of an operand. Throws a BrokenInvariant if the op has no operand of that name. */
export function operandIn({ access }: OperandLayout, name: string): Expr {
  const kind = access.get(name)?.kind;
  invariant(kind !== undefined, `a formula has no operand ${name}`);
  return { kind: "operand", name, scope: kind === "table" ? "element" : kind };
}
/** Returns the expressions of all operands by name. */
export const operandsOf = (layout: OperandLayout): Readonly<Record<string, Expr>> =>
  Object.fromEntries([...layout.access.keys()].map((name) => [name, operandIn(layout, name)]));

/** Returns the product of some dims. */
export const productOf = (dims: readonly string[], d: Readonly<Record<string, number>>): number =>
  dims.reduce((n, dim) => {
    const size = d[dim];
    invariant(size !== undefined, `a formula has no size of dim ${dim}`);
    return n * size;
  }, 1);
