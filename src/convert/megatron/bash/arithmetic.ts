/** Arithmetic of bash: `$(( ))`, `(( ))` and comparisons of numbers. 64-bit integers, as in bash. */
import type { ArithmeticExpression } from "unbash";

/** What arithmetic reads and changes. */
export interface Numbers {
  /** Returns the number that an operand stands for (a literal, a name or an expansion); undefined if it is not known. */
  read(operand: string, pos: number): bigint | undefined;
  /** Assigns a variable; undefined means not known. */
  assign(name: string, value: bigint | undefined): void;
}

const truth = (condition: boolean): bigint => (condition ? 1n : 0n);

const binary: Readonly<Record<string, (a: bigint, b: bigint) => bigint | undefined>> = {
  "+": (a, b) => a + b,
  "-": (a, b) => a - b,
  "*": (a, b) => a * b,
  "/": (a, b) => (b === 0n ? undefined : a / b),
  "%": (a, b) => (b === 0n ? undefined : a % b),
  "**": (a, b) => (b < 0n || b > 64n ? undefined : a ** b),
  "<<": (a, b) => (b < 0n || b > 63n ? undefined : a << b),
  ">>": (a, b) => (b < 0n || b > 63n ? undefined : a >> b),
  "&": (a, b) => a & b,
  "|": (a, b) => a | b,
  "^": (a, b) => a ^ b,
  "<": (a, b) => truth(a < b),
  ">": (a, b) => truth(a > b),
  "<=": (a, b) => truth(a <= b),
  ">=": (a, b) => truth(a >= b),
  "==": (a, b) => truth(a === b),
  "!=": (a, b) => truth(a !== b),
  "&&": (a, b) => truth(a !== 0n && b !== 0n),
  "||": (a, b) => truth(a !== 0n || b !== 0n),
  ",": (_, b) => b,
};

const unary: Readonly<Record<string, (a: bigint) => bigint>> = {
  "+": (a) => a,
  "-": (a) => -a,
  "!": (a) => truth(a === 0n),
  "~": (a) => ~a,
};

/** Returns the value of an expression; undefined if an operand is not known, or the operation has no value. */
export function evaluate(expression: ArithmeticExpression, numbers: Numbers): bigint | undefined {
  switch (expression.type) {
    case "ArithmeticWord":
      return numbers.read(expression.value, expression.pos);
    case "ArithmeticGroup":
      return evaluate(expression.expression, numbers);
    case "ArithmeticTernary": {
      const test = evaluate(expression.test, numbers);
      if (test === undefined) return undefined;
      return evaluate(test === 0n ? expression.alternate : expression.consequent, numbers);
    }
    case "ArithmeticCommandExpansion":
      return numbers.read(expression.text, expression.pos);
    case "ArithmeticUnary": {
      const { operator, operand, prefix } = expression;
      const value = evaluate(operand, numbers);
      if (operator !== "++" && operator !== "--") return value === undefined ? undefined : unary[operator]?.(value);
      const next = value === undefined ? undefined : operator === "++" ? value + 1n : value - 1n;
      if (operand.type === "ArithmeticWord") numbers.assign(operand.value, next);
      return prefix ? next : value;
    }
    case "ArithmeticBinary":
      return evaluateBinary(expression, numbers);
    default:
      return expression satisfies never;
  }
}

function evaluateBinary(
  { operator, left, right }: Extract<ArithmeticExpression, { type: "ArithmeticBinary" }>,
  numbers: Numbers,
): bigint | undefined {
  const assigns = /^(?<by>[-+*/%&|^]|<<|>>)?=$/.exec(operator);
  const b = evaluate(right, numbers);
  if (assigns && left.type === "ArithmeticWord") {
    const by = assigns.groups?.by;
    const a = by === undefined ? 0n : evaluate(left, numbers);
    const value = by === undefined ? b : a === undefined || b === undefined ? undefined : binary[by]?.(a, b);
    numbers.assign(left.value, value);
    return value;
  }
  const a = evaluate(left, numbers);
  return a === undefined || b === undefined ? undefined : binary[operator]?.(a, b);
}

/** Returns the integer that a literal stands for, as bash reads it: decimal, 0x, or 0 and octal digits; undefined if it is none. */
export function integerOf(text: string): bigint | undefined {
  const word = text.trim();
  if (/^[-+]?0[0-7]+$/.test(word)) return BigInt(`0o${word.replace(/^[-+]?0/, "")}`) * (word.startsWith("-") ? -1n : 1n);
  if (/^0[xX][0-9a-fA-F]+$/.test(word) || /^\d+$/.test(word)) return BigInt(word);
  return /^[-+]\d+$/.test(word) ? BigInt(word.replace("+", "")) : undefined;
}
