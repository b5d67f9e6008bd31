/** Expressions of layers, as in --moe-layer-freq: a Python list such as `([0]*3+[1]*58)`, or a period. */

/** The longest list that an expression may make: the limit of model.layers. */
const MOST_LAYERS = 4096;

type Value = number | readonly number[];

/** Evaluates lists, integers, `+`, `*` and parentheses. Returns undefined for another text, or a list that is too long. */
export function evaluatePattern(text: string): Value | undefined {
  // a value may be quoted twice: by the shell and inside
  const tokens = text.replace(/^['"]+|['"]+$/g, "").match(/\d+|[[\](),+*]|\S/g) ?? [];
  let at = 0;
  const isNext = (token: string): boolean => tokens[at] === token && ++at > 0;
  const sum = (): Value | undefined => {
    let left = product();
    while (left !== undefined && isNext("+")) left = added(left, product());
    return left;
  };
  const product = (): Value | undefined => {
    let left = atom();
    while (left !== undefined && isNext("*")) left = repeated(left, atom());
    return left;
  };
  const atom = (): Value | undefined => {
    if (isNext("(")) {
      const inner = sum();
      return isNext(")") ? inner : undefined;
    }
    if (isNext("[")) return list();
    const token = tokens[at++];
    return token !== undefined && /^\d+$/.test(token) ? Number(token) : undefined;
  };
  const list = (): Value | undefined => {
    const items: number[] = [];
    while (!isNext("]")) {
      const item = sum();
      if (typeof item !== "number") return undefined;
      items.push(item);
      if (!isNext(",") && tokens[at] !== "]") return undefined;
    }
    return items;
  };
  const value = sum();
  return at === tokens.length ? value : undefined;
}

function added(a: Value, b: Value | undefined): Value | undefined {
  if (typeof a === "number" && typeof b === "number") return a + b;
  if (typeof a === "number" || typeof b === "number" || b === undefined) return undefined;
  return a.length + b.length > MOST_LAYERS ? undefined : [...a, ...b];
}

function repeated(a: Value, b: Value | undefined): Value | undefined {
  if (b === undefined) return undefined;
  if (typeof a === "number") return typeof b === "number" ? a * b : repeated(b, a);
  if (typeof b !== "number" || a.length * b > MOST_LAYERS) return undefined;
  return Array.from({ length: b }, () => a).flat();
}
