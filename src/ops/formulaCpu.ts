/**
 * The CPU reference of a formula. Rows are evaluated in blocks: each expression fills a buffer of doubles in one loop, and results are rounded
 * when they are stored. Sums add in the order of the elements.
 */
import {
  type Expr,
  type Fn,
  isNarrower,
  type OperandLayout,
  productOf,
  type Result,
  scopeOf,
  type Total,
  testedBy,
  type ValueScope,
} from "./formula.ts";
import { invariant } from "./invariant.ts";

type Arrays = Readonly<Record<string, Float32Array>>;
type Sizes = Readonly<Record<string, number>>;
type Step = () => void;

/** Elements per block: the buffers of 8 KiB of a formula stay in the L2 cache. */
const BLOCK = 1024;

/** A formula that is prepared for some sizes and attributes. */
export class CpuFormula {
  private readonly width: number;
  /** Rows per block. */
  private readonly most: number;
  private readonly perLaunch: Step[] = [];
  private readonly perBlock: Step[] = [];
  private readonly stores: Step[] = [];
  private readonly ends: Step[] = [];
  private readonly buffers = new Map<Expr, Map<ValueScope, Float64Array>>();
  private t: Arrays = {};
  /** The first row of the current block, and how many it has. */
  private first = 0;
  private rows = 0;

  constructor(
    private readonly layout: OperandLayout,
    results: Readonly<Record<string, Result>>,
    private readonly d: Sizes,
  ) {
    this.width = productOf(layout.rowDims, d);
    this.most = Math.max(1, Math.floor(BLOCK / this.width));
    for (const [name, result] of Object.entries(results))
      if (result.kind === "total") this.addTotal(name, result);
      else this.addStore(name, result);
  }

  /** Stores the results in the arrays of the outputs, or adds totals. `raggedRows` is the number of rows that exist if operands are ragged. */
  run(t: Arrays, raggedRows: number): void {
    this.t = t;
    const count = this.layout.full.ragged ? raggedRows : arrayOf(t, this.layout.full.name).length / this.width;
    for (const step of this.perLaunch) step();
    for (this.first = 0; this.first < count; this.first += this.most) {
      this.rows = Math.min(this.most, count - this.first);
      for (const step of this.perBlock) step();
      for (const store of this.stores) store();
    }
    for (const end of this.ends) end();
    this.t = {};
  }

  private addTotal(name: string, { term, by, divides }: Total): void {
    const scope = scopeOf(term);
    const values = this.values(term, scope);
    let sum = 0;
    this.perLaunch.push(() => {
      sum = 0;
    });
    this.perBlock.push(() => {
      const n = this.count(scope);
      for (let k = 0; k < n; k++) sum += values[k]!;
    });
    this.ends.push(() => {
      arrayOf(this.t, name)[0]! += divides ? sum / by : by * sum;
    });
  }

  /** Outputs may be inputs too, so a result is stored after all results of a block are computed. */
  private addStore(name: string, result: Expr): void {
    const scope: ValueScope = this.layout.access.get(name)?.kind === "row" ? "row" : "element";
    const values = this.values(result, scope);
    this.stores.push(() => {
      const out = arrayOf(this.t, name);
      const at = this.first * (scope === "row" ? 1 : this.width);
      const n = this.count(scope);
      for (let k = 0; k < n; k++) out[at + k] = values[k]!;
    });
  }

  /** Returns how many values of a scope the current block has. */
  private count(scope: ValueScope): number {
    return scope === "element" ? this.rows * this.width : scope === "row" ? this.rows : 1;
  }

  /** Returns the buffer with an expression's value for each element, row or launch. */
  private values(e: Expr, scope: ValueScope): Float64Array {
    let own = this.buffers.get(e);
    if (!own) this.buffers.set(e, (own = new Map()));
    const known = own.get(scope);
    if (known) return known;
    const out = isNarrower(scopeOf(e), scope) ? this.broadcast(e, scope) : this.compute(e);
    own.set(scope, out);
    return out;
  }

  private buffer(scope: ValueScope): Float64Array {
    return new Float64Array(scope === "element" ? this.most * this.width : scope === "row" ? this.most : 1);
  }

  /** Adds a step for an expression of this scope. */
  private addStep(scope: ValueScope, step: Step): void {
    (isNarrower(scope, "row") ? this.perLaunch : this.perBlock).push(step);
  }

  /** Repeats the values of a narrower scope. */
  private broadcast(e: Expr, scope: ValueScope): Float64Array {
    const own = scopeOf(e);
    const out = this.buffer(scope);
    if (e.kind === "constant") return out.fill(e.value);
    const from = this.values(e, own);
    const { width } = this;
    if (own === "row")
      this.addStep(scope, () => {
        for (let r = 0; r < this.rows; r++) out.fill(from[r]!, r * width, (r + 1) * width);
      });
    // launch values do not change from block to block
    else this.addStep(own, () => out.fill(from[0]!));
    return out;
  }

  private compute(e: Expr): Float64Array {
    const scope = scopeOf(e);
    switch (e.kind) {
      case "operand":
        return this.load(e.name, scope);
      case "variable":
        return this.values(e.value, scope);
      case "constant":
        return this.buffer(scope).fill(e.value);
      case "call": {
        const [a, b] = e.args.map((x) => this.values(x, scope));
        const out = this.buffer(scope);
        const loop = loops[e.fn];
        invariant(a !== undefined, `${e.fn} has no operand`);
        this.addStep(scope, () => loop(out, a, b ?? a, this.count(scope)));
        return out;
      }
      case "select":
        return this.select(e, scope);
      case "rowReduce": {
        const term = this.values(e.term, "element");
        const out = this.buffer(scope);
        this.addStep(scope, () => reduceRows(e.by, out, term, this.rows, this.width));
        return out;
      }
      default:
        return e satisfies never;
    }
  }

  private select({ test, yes, no }: Extract<Expr, { kind: "select" }>, scope: ValueScope): Float64Array {
    const out = this.buffer(scope);
    const [x, y] = [this.values(yes, scope), this.values(no, scope)];
    const compared = testedBy(test);
    const holds = { greater: (p: number, q: number) => p > q, equal: (p: number, q: number) => p === q, finite: Number.isFinite }[
      test.kind
    ];
    // a condition per launch selects a whole buffer
    const own = compared.every((c) => isNarrower(scopeOf(c), "row")) ? "launch" : scope;
    const [a, b] = compared.map((c) => this.values(c, own));
    invariant(a !== undefined, "a condition compares nothing");
    const other = b ?? a;
    this.addStep(scope, () => {
      const n = this.count(scope);
      if (own === "launch") copy(out, holds(a[0]!, other[0]!) ? x : y, n);
      else for (let k = 0; k < n; k++) out[k] = holds(a[k]!, other[k]!) ? x[k]! : y[k]!;
    });
    return out;
  }

  private load(name: string, scope: ValueScope): Float64Array {
    const out = this.buffer(scope);
    const access = this.layout.access.get(name);
    if (access?.kind === "table") {
      const [batch, width] = [productOf(access.batch, this.d), productOf(access.width, this.d)];
      this.addStep(scope, () => {
        const from = arrayOf(this.t, name);
        const n = this.count(scope);
        for (let k = 0, i = this.first * this.width; k < n; k++, i++) out[k] = from[Math.floor(i / batch) * width + (i % width)]!;
      });
    } else {
      const stride = scope === "element" ? this.width : scope === "row" ? 1 : 0;
      this.addStep(scope, () => {
        const from = arrayOf(this.t, name);
        const at = this.first * stride;
        const n = this.count(scope);
        for (let k = 0; k < n; k++) out[k] = from[at + k]!;
      });
    }
    return out;
  }
}

function arrayOf(t: Arrays, name: string): Float32Array {
  const array = t[name];
  invariant(array !== undefined, `a formula has no operand ${name}`);
  return array;
}

function copy(out: Float64Array, from: Float64Array, n: number): void {
  for (let k = 0; k < n; k++) out[k] = from[k]!;
}

function reduceRows(by: "sum" | "max", out: Float64Array, term: Float64Array, rows: number, width: number): void {
  for (let r = 0; r < rows; r++) {
    let all = by === "sum" ? 0 : Number.NEGATIVE_INFINITY;
    const end = (r + 1) * width;
    if (by === "sum") for (let k = r * width; k < end; k++) all += term[k]!;
    else for (let k = r * width; k < end; k++) all = Math.max(all, term[k]!);
    out[r] = all;
  }
}

/** One loop per function, so that each is compiled for itself. */
const loops: Readonly<Record<Fn, (out: Float64Array, a: Float64Array, b: Float64Array, n: number) => void>> = {
  add(out, a, b, n) {
    for (let k = 0; k < n; k++) out[k] = a[k]! + b[k]!;
  },
  sub(out, a, b, n) {
    for (let k = 0; k < n; k++) out[k] = a[k]! - b[k]!;
  },
  mul(out, a, b, n) {
    for (let k = 0; k < n; k++) out[k] = a[k]! * b[k]!;
  },
  div(out, a, b, n) {
    for (let k = 0; k < n; k++) out[k] = a[k]! / b[k]!;
  },
  approxDiv(out, a, b, n) {
    for (let k = 0; k < n; k++) out[k] = a[k]! / b[k]!;
  },
  max(out, a, b, n) {
    for (let k = 0; k < n; k++) out[k] = Math.max(a[k]!, b[k]!);
  },
  min(out, a, b, n) {
    for (let k = 0; k < n; k++) out[k] = Math.min(a[k]!, b[k]!);
  },
  neg(out, a, _, n) {
    for (let k = 0; k < n; k++) out[k] = -a[k]!;
  },
  abs(out, a, _, n) {
    for (let k = 0; k < n; k++) out[k] = Math.abs(a[k]!);
  },
  exp(out, a, _, n) {
    for (let k = 0; k < n; k++) out[k] = Math.exp(a[k]!);
  },
  log(out, a, _, n) {
    for (let k = 0; k < n; k++) out[k] = Math.log(a[k]!);
  },
  log1p(out, a, _, n) {
    for (let k = 0; k < n; k++) out[k] = Math.log1p(a[k]!);
  },
  sqrt(out, a, _, n) {
    for (let k = 0; k < n; k++) out[k] = Math.sqrt(a[k]!);
  },
  sigmoid(out, a, _, n) {
    for (let k = 0; k < n; k++) out[k] = 1 / (1 + Math.exp(-a[k]!));
  },
  oneMinusPower(out, base, exponent, n) {
    for (let k = 0; k < n; k++) out[k] = 1 - base[k]! ** exponent[k]!;
  },
};
