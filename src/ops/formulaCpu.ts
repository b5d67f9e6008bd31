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
  testedBy,
  type ValueScope,
} from "./formula.ts";
import { invariant } from "./invariant.ts";

type Arrays = Readonly<Record<string, Float32Array>>;
type Sizes = Readonly<Record<string, number>>;
type Step = () => void;

/** Elements per block: buffers of 16 KiB stay in the L1 and L2 caches. */
const BLOCK = 2048;

/**
 * Evaluates the results of a formula and stores them, or adds totals, in the arrays of the outputs. `raggedRows` is the number of rows that
 * exist if the operands are ragged.
 */
export function evaluateFormula(
  layout: OperandLayout,
  results: Readonly<Record<string, Result>>,
  t: Arrays,
  d: Sizes,
  raggedRows: number,
): void {
  const width = productOf(layout.rowDims, d);
  const count = layout.full.ragged ? raggedRows : arrayOf(t, layout.full.name).length / width;
  const block = new Block(layout, t, d, width, Math.max(1, Math.min(count, Math.floor(BLOCK / width))));
  const stores: Step[] = [];
  const ends: Step[] = [];
  for (const [name, result] of Object.entries(results)) {
    const out = arrayOf(t, name);
    if (result.kind === "total") {
      const scope = scopeOf(result.term);
      const values = block.values(result.term, scope);
      let sum = 0;
      stores.push(() => {
        for (let k = 0; k < block.count(scope); k++) sum += values[k]!;
      });
      ends.push(() => {
        out[0]! += result.divides ? sum / result.by : result.by * sum;
      });
    } else {
      const kind = layout.access.get(name)?.kind;
      const scope: ValueScope = kind === "row" ? "row" : "element";
      const values = block.values(result, scope);
      stores.push(() => out.set(values.subarray(0, block.count(scope)), block.first * (scope === "row" ? 1 : width)));
    }
  }
  block.run(count, () => {
    for (const store of stores) store();
  });
  for (const end of ends) end();
}

function arrayOf(t: Arrays, name: string): Float32Array {
  const array = t[name];
  invariant(array !== undefined, `a formula has no operand ${name}`);
  return array;
}

/** Buffers of all expressions for one block of rows, and the steps that fill them in order. */
class Block {
  /** The first row of the block, and how many it has. */
  first = 0;
  private rows = 0;
  private readonly perLaunch: Step[] = [];
  private readonly perBlock: Step[] = [];
  private readonly buffers = new Map<Expr, Map<ValueScope, Float64Array>>();

  constructor(
    private readonly layout: OperandLayout,
    private readonly t: Arrays,
    private readonly d: Sizes,
    private readonly width: number,
    private readonly most: number,
  ) {}

  /** Returns how many values of a scope the current block has. */
  count(scope: ValueScope): number {
    return scope === "element" ? this.rows * this.width : scope === "row" ? this.rows : 1;
  }

  /** Fills the buffers for all blocks of `count` rows and calls `visit` after each. */
  run(count: number, visit: Step): void {
    for (const step of this.perLaunch) step();
    for (this.first = 0; this.first < count; this.first += this.most) {
      this.rows = Math.min(this.most, count - this.first);
      for (const step of this.perBlock) step();
      visit();
    }
  }

  /** Returns the buffer with an expression's value for each element, row or launch. */
  values(e: Expr, scope: ValueScope): Float64Array {
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
    const from = this.values(e, own);
    const out = this.buffer(scope);
    const { width } = this;
    if (own === "row")
      this.addStep(scope, () => {
        for (let r = 0; r < this.count("row"); r++) out.fill(from[r]!, r * width, (r + 1) * width);
      });
    // launch values do not change from block to block
    else this.addStep(own, () => out.fill(from[0]!));
    return out;
  }

  private compute(e: Expr): Float64Array {
    const scope = scopeOf(e);
    if (e.kind === "operand") return this.load(e.name, scope);
    if (e.kind === "variable") return this.values(e.value, scope);
    const out = this.buffer(scope);
    switch (e.kind) {
      case "constant":
        out[0] = e.value;
        break;
      case "call": {
        const [a, b] = e.args.map((x) => this.values(x, scope));
        this.addStep(scope, () => loops[e.fn](out, a!, b ?? a!, this.count(scope)));
        break;
      }
      case "select": {
        const { test } = e;
        const [a, b] = testedBy(test).map((x) => this.values(x, scope));
        const [yes, no] = [this.values(e.yes, scope), this.values(e.no, scope)];
        const holds = { greater: (x: number, y: number) => x > y, equal: (x: number, y: number) => x === y, finite: Number.isFinite };
        this.addStep(scope, () => {
          for (let k = 0; k < this.count(scope); k++) out[k] = holds[test.kind](a![k]!, (b ?? a!)[k]!) ? yes[k]! : no[k]!;
        });
        break;
      }
      case "rowReduce": {
        const term = this.values(e.term, "element");
        this.addStep(scope, () => reduceRows(e.by, out, term, this.count(scope), this.width));
        break;
      }
      default:
        e satisfies never;
    }
    return out;
  }

  private load(name: string, scope: ValueScope): Float64Array {
    const from = arrayOf(this.t, name);
    const out = this.buffer(scope);
    const access = this.layout.access.get(name);
    if (access?.kind === "table") {
      const [batch, width] = [productOf(access.batch, this.d), productOf(access.width, this.d)];
      this.addStep(scope, () => {
        for (let k = 0, i = this.first * this.width; k < this.count(scope); k++, i++)
          out[k] = from[Math.floor(i / batch) * width + (i % width)]!;
      });
    } else {
      const stride = scope === "element" ? this.width : scope === "row" ? 1 : 0;
      this.addStep(scope, () => out.set(from.subarray(this.first * stride, this.first * stride + this.count(scope))));
    }
    return out;
  }
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
