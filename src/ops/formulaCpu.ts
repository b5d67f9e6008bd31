/**
 * The CPU reference of a formula, as generated JavaScript: one loop over rows, one over the elements of a row, with local constants. It
 * computes in double precision and rounds results when it stores them. Sums add in the order of the elements.
 */

import { erf } from "./erf.ts";
import { type Expr, type Fn, type OperandLayout, productOf, type Result, scopeOf, type Test, type Total } from "./formula.ts";
import { invariant } from "./invariant.ts";

type Arrays = Readonly<Record<string, Float32Array>>;
type Sizes = Readonly<Record<string, number>>;
/**
 * Stores the results in the arrays of the outputs, or adds totals. `raggedRows` is the number of rows that exist if operands are ragged;
 * `start` the global index of the first element of a row.
 */
export type CpuFormula = (t: Arrays, raggedRows: number, start: number) => void;
type Generated = (t: Arrays, rows: number, start: number, special: typeof erf) => void;

/** Generated functions by source: uses that differ in nothing that the source contains share one, and V8 compiles it once. */
const functions = new Map<string, Generated>();

/** Returns the reference of a formula for some sizes. Throws a BrokenInvariant if a size is missing. */
export function cpuFormula(layout: OperandLayout, results: Readonly<Record<string, Result>>, d: Sizes): CpuFormula {
  const source = new Source(layout, d).textOf(results);
  let run = functions.get(source);
  if (!run) functions.set(source, (run = new Function("t", "rows", "start", "erf", source) as Generated));
  const generated = run;
  const width = productOf(layout.rowDims, d);
  const { name, ragged } = layout.full;
  return (t, raggedRows, start) => {
    for (const operand of layout.access.keys()) invariant(t[operand] !== undefined, () => `a formula has no operand ${operand}`);
    generated(t, ragged ? raggedRows : (t[name]?.length ?? 0) / width, start, erf);
  };
}

/** Statements of one scope, and the names of the expressions that they compute. */
class Block {
  readonly lines: string[] = [];
  private readonly names = new Map<Expr, string>();

  nameOf(e: Expr): string | undefined {
    return this.names.get(e);
  }
  /** Declares a constant with the value of an expression. Returns its name. */
  declare(e: Expr, name: string, text: string): string {
    this.lines.push(`const ${name} = ${text};`);
    this.names.set(e, name);
    return name;
  }
  /** Records the name of an expression that other statements compute. */
  record(e: Expr, name: string): void {
    this.names.set(e, name);
  }
}

/** The source of one formula. */
class Source {
  private readonly launch = new Block();
  private readonly row = new Block();
  private readonly element = new Block();
  private readonly stores = { launch: [] as string[], row: [] as string[], element: [] as string[] };
  private readonly width: number;
  private names = 0;

  constructor(
    private readonly layout: OperandLayout,
    private readonly d: Sizes,
  ) {
    this.width = productOf(layout.rowDims, d);
  }

  textOf(results: Readonly<Record<string, Result>>): string {
    for (const [name, result] of Object.entries(results))
      if (result.kind === "total") this.addTotal(name, result);
      else this.addStore(name, result);
    const { launch, row, element, stores } = this;
    const operands = [...this.layout.access.keys()].map((name) => `const ${arrayOf(name)} = t.${name};`);
    const elements = [...element.lines, ...stores.element];
    const rows = [...row.lines, ...(elements.length > 0 ? this.overElements(elements) : []), ...stores.row];
    // a formula without values per row is one loop over all elements
    const body =
      row.lines.length + stores.row.length > 0
        ? ["for (let r = 0; r < rows; r++) {", ...rows, "}"]
        : [`for (let i = 0, end = rows * ${this.width}; i < end; i++) {`, ...elements, "}"];
    return [...operands, ...launch.lines, ...body, ...stores.launch].join("\n");
  }

  /** Returns a loop over the elements of row `r`. */
  private overElements(lines: readonly string[]): string[] {
    return [`for (let i = r * ${this.width}, end = i + ${this.width}; i < end; i++) {`, ...lines, "}"];
  }

  private addTotal(name: string, { term, by, divides }: Total): void {
    const sum = this.newName();
    const scope = scopeOf(term) === "element" ? "element" : "row";
    const value = this.valueOf(term, this.element);
    this.launch.lines.push(`let ${sum} = 0;`);
    this.stores[scope].push(`${sum} += ${value};`);
    const result = divides ? `${sum} / ${literal(by)}` : `${literal(by)} * ${sum}`;
    this.stores.launch.push(`${arrayOf(name)}[0] += ${result};`);
  }

  /** Outputs may be inputs too, so a result is stored after all results of its element or row are computed. */
  private addStore(name: string, result: Expr): void {
    const scope = this.layout.access.get(name)?.kind === "row" ? "row" : "element";
    const value = this.valueOf(result, this.element);
    this.stores[scope].push(`${arrayOf(name)}[${scope === "row" ? "r" : "i"}] = ${value};`);
  }

  /** Returns the name or the literal of an expression, after adding its statement to the block of its scope; `element` is that of elements. */
  private valueOf(e: Expr, element: Block): string {
    if (e.kind === "constant") return literal(e.value);
    if (e.kind === "variable") return this.valueOf(e.value, element);
    const scope = scopeOf(e);
    const block = scope === "element" ? element : scope === "row" ? this.row : this.launch;
    const known = block.nameOf(e);
    if (known !== undefined) return known;
    switch (e.kind) {
      case "operand":
        return block.declare(e, this.newName(), this.load(e));
      case "column":
        return block.declare(e, this.newName(), `start + i % ${this.width}`);
      case "call": {
        const [a, b] = e.args.map((x) => this.valueOf(x, element));
        invariant(a !== undefined, `${e.fn} has no operand`);
        return block.declare(e, this.newName(), calls[e.fn](a, b ?? a));
      }
      case "select": {
        const [yes, no] = [this.valueOf(e.yes, element), this.valueOf(e.no, element)];
        return block.declare(e, this.newName(), `${this.condition(e.test, element)} ? ${yes} : ${no}`);
      }
      case "rowReduce": {
        const own = new Block();
        const term = this.valueOf(e.term, own);
        const all = this.newName();
        const next = e.by === "sum" ? `${all} + ${term}` : `Math.max(${all}, ${term})`;
        this.row.lines.push(`let ${all} = ${e.by === "sum" ? "0" : "-Infinity"};`);
        this.row.lines.push(...this.overElements([...own.lines, `${all} = ${next};`]));
        this.row.record(e, all);
        return all;
      }
      default:
        return e satisfies never;
    }
  }

  private condition(test: Test, element: Block): string {
    if (test.kind === "finite") return `Number.isFinite(${this.valueOf(test.x, element)})`;
    return `${this.valueOf(test.a, element)} ${test.kind === "greater" ? ">" : "==="} ${this.valueOf(test.b, element)}`;
  }

  private load({ name, scope }: Extract<Expr, { kind: "operand" }>): string {
    const access = this.layout.access.get(name);
    if (access?.kind === "table") {
      const [batch, width] = [productOf(access.batch, this.d), productOf(access.width, this.d)];
      return `${arrayOf(name)}[Math.floor(i / ${batch}) * ${width} + (i % ${width})]`;
    }
    return `${arrayOf(name)}[${scope === "element" ? "i" : scope === "row" ? "r" : "0"}]`;
  }

  private newName(): string {
    return `v${this.names++}`;
  }
}

/** The name of an operand's array in the source: no word of the language. */
const arrayOf = (operand: string): string => `$${operand}`;

/** Writes a number, negative ones in parentheses. */
function literal(x: number): string {
  if (Object.is(x, -0)) return "(-0)";
  return x < 0 ? `(${x})` : String(x);
}

/** The text of a function of names and literals. */
const calls: Readonly<Record<Fn, (a: string, b: string) => string>> = {
  add: (a, b) => `${a} + ${b}`,
  sub: (a, b) => `${a} - ${b}`,
  mul: (a, b) => `${a} * ${b}`,
  div: (a, b) => `${a} / ${b}`,
  approxDiv: (a, b) => `${a} / ${b}`,
  max: (a, b) => `Math.max(${a}, ${b})`,
  min: (a, b) => `Math.min(${a}, ${b})`,
  neg: (a) => `-${a}`,
  abs: (a) => `Math.abs(${a})`,
  exp: (a) => `Math.exp(${a})`,
  log: (a) => `Math.log(${a})`,
  log1p: (a) => `Math.log1p(${a})`,
  sqrt: (a) => `Math.sqrt(${a})`,
  sigmoid: (a) => `1 / (1 + Math.exp(-${a}))`,
  erf: (a) => `erf(${a})`,
  oneMinusPower: (base, exponent) => `1 - ${base} ** ${exponent}`,
};
