/** Operands of the inline assembly of warpgroup products (wgmma, sm_90a). */

/** Returns operands 0 to `count` - 1 in lines of `perLine`, with a comma behind each but the last. `perLine` must divide `count`. */
const linesOf = (count: number, perLine: number, operand: (i: number) => string): string[] =>
  Array.from({ length: count / perLine }, (_, l) => {
    const line = Array.from({ length: perLine }, (_, i) => operand(l * perLine + i)).join(", ");
    return (l + 1) * perLine === count ? line : `${line},`;
  });

/**
 * Returns the operands for the sums of a product of 64 rows and n columns: their number per thread, their names in the instruction (`namesPerLine` in a
 * line) and the registers that hold them.
 */
export function sumOperands(n: number, namesPerLine: 8 | 16 = 8) {
  const count = n / 2;
  return { count, names: linesOf(count, namesPerLine, (i) => `%${i}`), places: linesOf(count, 8, (i) => `"+f"(sums[${i}])`) };
}

/** Returns the left operand of a product of n columns that has it in registers: the four after the sums. */
export const leftInRegisters = (n: number): string => `{${[0, 1, 2, 3].map((i) => `%${n / 2 + i}`).join(", ")}}`;
