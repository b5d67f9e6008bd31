/**
 * ExprText of formulas (src/ops/formula.ts) in a GPU language: statements per launch, per row and per element, reductions over a row, and an
 * expression for each result.
 */
import { type Expr, type Fn, isNarrower, type Result, scopeOf, type Test, type ValueScope } from "../ops/formula.ts";
import { invariant } from "../ops/invariant.ts";

/** Binding strength of an expression: a weaker part of a stronger expression needs parentheses. */
export const strength = { select: 0, compare: 1, add: 2, mul: 3, unary: 4, atom: 5 } as const;
type Strength = (typeof strength)[keyof typeof strength];

/** The text of an expression. */
export interface ExprText {
  readonly text: string;
  readonly strength: Strength;
  /** Whether it is a vector of elements rather than one number. */
  readonly isVector: boolean;
}

/** What differs between languages. */
export interface Language {
  literal(x: number): string;
  /** Declares a constant. */
  declare(name: string, value: string): string;
  /** Functions that are not operators. Of a power, the first operand is the logarithm of its base. */
  call(fn: Exclude<Fn, Operator>, args: readonly ExprText[]): ExprText;
  test(test: Test["kind"], args: readonly ExprText[]): string;
  select(test: string, yes: ExprText, no: ExprText, isVector: boolean): ExprText;
  /**
   * How products and sums are rounded. Compilers otherwise choose in each kernel whether a product and a sum are one operation, and which of
   * two products: a formula would have other bits in a kernel that also casts its result. Absent: the compiler chooses.
   */
  readonly rounding?: Rounding;
  /** Whether elements are computed as vectors. */
  readonly vectors: boolean;
  /** Whether a division by a constant, or by a variable per launch or per row, becomes a product with the reciprocal. */
  readonly reciprocals: boolean;
}
/** Arithmetic whose roundings a language states. */
interface Rounding {
  /** `a * b`, rounded: it is never one operation with a sum. */
  product(a: ExprText, b: ExprText): ExprText;
  /** `a * b + c`, rounded once. */
  fused(a: ExprText, b: ExprText, c: ExprText): ExprText;
  /** The factor by which an approximate quotient multiplies. */
  approxReciprocal(b: ExprText): ExprText;
}
type Operator = "add" | "sub" | "mul" | "div" | "neg";
const operators = { add: "+", sub: "-", mul: "*", div: "/" } as const;

/** A reduction over a row, and the statements per row that follow it. */
export interface RowStage {
  readonly name: string;
  readonly by: "sum" | "max";
  readonly term: string;
  readonly after: string[];
}

/** The text of all results of one op. */
export interface FormulaText {
  readonly once: readonly string[];
  /** Statements per row that need no reduction. */
  readonly row: readonly string[];
  readonly stages: readonly RowStage[];
  readonly element: readonly string[];
  readonly results: ReadonlyMap<string, ExprText>;
  /** The operands that the expressions read. */
  readonly reads: ReadonlySet<string>;
  /** The functions that they call. */
  readonly calls: ReadonlySet<Fn>;
  /** Whether they read `column`, the global index of the element along the last dim of a row. */
  readonly hasColumn: boolean;
}

/** Returns the text of results. `operand` replaces the names of operands. */
export function formulaText(language: Language, results: Readonly<Record<string, Result>>, operand = (name: string) => name): FormulaText {
  const printer = new Printer(language, operand);
  const texts = Object.entries(results).map(([name, r]): [string, ExprText] => [
    name,
    r.kind === "total" ? printer.print(r.term) : printer.rounded(r),
  ]);
  return { ...printer.parts, results: new Map(texts) };
}

class Printer {
  readonly parts = {
    once: [] as string[],
    row: [] as string[],
    stages: [] as RowStage[],
    element: [] as string[],
    reads: new Set<string>(),
    calls: new Set<Fn>(),
    hasColumn: false,
  };
  private readonly declared = new Map<string, string>();

  constructor(
    private readonly language: Language,
    private readonly operand: (name: string) => string,
  ) {}

  print(e: Expr): ExprText {
    const { language } = this;
    switch (e.kind) {
      case "constant":
        return this.number(e.value);
      case "operand":
        this.parts.reads.add(e.name);
        return this.atom(this.operand(e.name), e);
      case "column":
        this.parts.hasColumn = true;
        return this.atom("column", e);
      case "variable":
        return this.variable(e.name, e, () => this.rounded(e.value).text);
      case "call":
        return this.call(e.fn, e.args);
      case "select": {
        const { test } = e;
        const args = (test.kind === "finite" ? [test.x] : [test.a, test.b]).map((x) => this.print(x));
        const isVector = this.isVector(e);
        return language.select(language.test(test.kind, args), this.rounded(e.yes), this.rounded(e.no), isVector);
      }
      case "rowReduce": {
        const { name, by } = e;
        const { text: term } = this.print(e.term);
        const known = this.parts.stages.find((s) => s.name === name);
        invariant(!known || known.term === term, `two reductions are called ${name}`);
        if (!known) this.parts.stages.push({ name, by, term, after: [] });
        return this.atom(name, e);
      }
      default:
        return e satisfies never;
    }
  }

  private number(value: number): ExprText {
    return { text: this.language.literal(value), strength: value < 0 ? strength.unary : strength.atom, isVector: false };
  }
  private atom(text: string, e: Expr): ExprText {
    return { text, strength: strength.atom, isVector: this.isVector(e) };
  }
  private isVector(e: Expr): boolean {
    return this.language.vectors && scopeOf(e) === "element";
  }

  /** Declares a variable at the scope of its value, once, and returns its name. */
  private variable(name: string, e: Expr, value: () => string): ExprText {
    const text = value();
    const known = this.declared.get(name);
    invariant(known === undefined || known === text, `two variables of a formula are called ${name}`);
    if (known === undefined) {
      this.declared.set(name, text);
      this.statements(scopeOf(e)).push(this.language.declare(name, text));
    }
    return this.atom(name, e);
  }
  private statements(scope: ValueScope): string[] {
    if (scope === "element") return this.parts.element;
    if (scope === "row") return this.parts.stages.at(-1)?.after ?? this.parts.row;
    return this.parts.once;
  }

  private call(fn: Fn, args: readonly Expr[]): ExprText {
    this.parts.calls.add(fn);
    const [a, b] = args;
    invariant(a !== undefined, `${fn} has no operand`);
    if (fn === "neg") return this.negative(this.rounded(a));
    if (fn === "add" || fn === "sub" || fn === "mul" || fn === "div") {
      invariant(b !== undefined, `${fn} has one operand`);
      if (fn === "add" || fn === "sub") return this.sum(fn, a, b);
      const inverse = fn === "div" ? this.reciprocal(b) : undefined;
      return this.binary(inverse ? "mul" : fn, this.print(a), inverse ?? this.print(b));
    }
    if (fn === "oneMinusPower") {
      invariant(a.kind === "constant" && b !== undefined, "the base of a power is a constant");
      return this.language.call(fn, [this.number(Math.log(a.value)), this.print(b)]);
    }
    return this.language.call(
      fn,
      args.map((x) => this.print(x)),
    );
  }

  private negative(x: ExprText): ExprText {
    return { text: `-${this.within(x, strength.atom)}`, strength: strength.unary, isVector: x.isVector };
  }

  /** Returns a sum or a difference. If a term is a product, they are one operation; of two products the second one. */
  private sum(fn: "add" | "sub", a: Expr, b: Expr): ExprText {
    const { rounding } = this.language;
    const [left, right] = [this.factors(a), this.factors(b)];
    if (rounding && right) return rounding.fused(fn === "sub" ? this.negative(right[0]) : right[0], right[1], this.rounded(a));
    if (rounding && left) {
      const other = this.rounded(b);
      return rounding.fused(...left, fn === "sub" ? this.negative(other) : other);
    }
    return this.binary(fn, this.print(a), this.print(b));
  }

  /** Returns an expression that is not a part of a product; a product is rounded if the language states roundings. */
  rounded(e: Expr): ExprText {
    const factors = this.factors(e);
    return factors && this.language.rounding ? this.language.rounding.product(...factors) : this.print(e);
  }

  /** Returns the two factors of an expression that is a product in a language that states roundings. */
  private factors(e: Expr): readonly [ExprText, ExprText] | undefined {
    const { rounding } = this.language;
    if (!rounding || e.kind !== "call") return undefined;
    const [a, b] = e.args;
    if (a === undefined || b === undefined) return undefined;
    if (e.fn !== "mul" && e.fn !== "approxDiv" && e.fn !== "div") return undefined;
    const first = this.print(a);
    const second = e.fn === "mul" ? this.print(b) : e.fn === "div" ? this.reciprocal(b) : rounding.approxReciprocal(this.print(b));
    if (!second) return undefined;
    this.parts.calls.add(e.fn);
    return [first, second];
  }

  private binary(fn: keyof typeof operators, a: ExprText, b: ExprText): ExprText {
    const own = fn === "add" || fn === "sub" ? strength.add : strength.mul;
    const text = `${this.within(a, own)} ${operators[fn]} ${this.within(b, own + 1)}`;
    return { text, strength: own, isVector: a.isVector || b.isVector };
  }
  private within({ text, strength: own }: ExprText, least: number): string {
    return own < least ? `(${text})` : text;
  }

  /** Returns the reciprocal of a divisor if the language multiplies by it. */
  private reciprocal(e: Expr): ExprText | undefined {
    if (!this.language.reciprocals) return undefined;
    if (e.kind === "constant") return this.number(1 / e.value);
    if (e.kind !== "variable" || !isNarrower(scopeOf(e), "element")) return undefined;
    return this.variable(e.name, e, () => this.binary("div", this.number(1), this.print(e.value)).text);
  }
}
