/** The formula of a gated linear unit (src/ops/gatedUnits.ts) as text for CUDA and WGSL. */
import { gatedUnits, type SigmoidArgument } from "../ops/gatedUnits.ts";

interface GatedUnitText {
  /** z(x), the argument of σ. */
  readonly argument: string;
  /** The derivative of x·σ(z(x)), where `s` holds σ(z(x)). */
  readonly slope: string;
}

/** Writes the formula for the gate `x`; `literal` writes an f32 literal of the language. */
export function gatedUnitText({ linear, cubic }: SigmoidArgument, x: string, literal: (n: number) => string): GatedUnitText {
  const isIdentity = linear === 1 && cubic === 0;
  const times = (square: number): string => (isIdentity ? "" : ` * (${literal(linear)} + ${literal(square)} * ${x} * ${x})`);
  const one = literal(1);
  return { argument: `${x}${times(cubic)}`, slope: `s * (${one} + ${x}${times(3 * cubic)} * (${one} - s))` };
}

/** A table of kernels with one entry for the op that `opOf` selects from each unit. */
export const perGatedUnit = <T>(
  opOf: "dense" | "denseGrad" | "rows" | "rowsGrad",
  kernelOf: (argument: SigmoidArgument) => T,
): Readonly<Record<string, T>> => Object.fromEntries(Object.values(gatedUnits).map((unit) => [unit[opOf].name, kernelOf(unit.argument)]));
