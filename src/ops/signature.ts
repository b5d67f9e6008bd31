/** The operands of an op as its signature declares them (see op.ts). */

/** One dim of an operand in a signature: `dim` with its `inner` factors. */
export interface DimSpec {
  readonly dim: string;
  readonly inner: readonly string[];
  /** The attribute that holds how many neighbours along the dim share an element. */
  readonly shared?: string;
  readonly replicated: boolean;
}
/** An operand of a signature. `ragged` counts the leading dims that are one dim in memory; `any` marks `...`. */
export interface Operand {
  readonly name: string;
  readonly dimSpecs: readonly DimSpec[];
  readonly ragged: number;
  readonly any: boolean;
}

/** Returns the operands of one side of a signature. */
export function operandsOfSide(side: string): Operand[] {
  return [...side.matchAll(/(\w+)\[([^\]]*)\]/g)].map(([, name, text]) => {
    const parts = text!.split(",").filter(Boolean);
    const dimSpecs = parts
      .flatMap((p) => p.split("~"))
      .map((p) => {
        const [outer, ...inner] = p.replace("!", "").split("*");
        const [dim, shared] = outer!.split("/");
        return { dim: dim!, inner, ...(shared === undefined ? {} : { shared }), replicated: p.endsWith("!") };
      });
    return { name: name!, dimSpecs, ragged: parts[0]?.includes("~") ? parts[0].split("~").length : 0, any: text === "..." };
  });
}

/** Returns how many neighbours along a dim share an element. */
export const sharersOf = ({ shared }: DimSpec, size: Readonly<Record<string, number>>): number =>
  shared === undefined ? 1 : (size[shared] ?? 1);

/** Returns the elements along one dim in memory: its size divided by the number of sharers (at least 1), times its inner factors. */
export const dimSize = (s: DimSpec, size: Readonly<Record<string, number>>): number =>
  s.inner.reduce((n, d) => n * size[d]!, Math.max(1, size[s.dim]! / sharersOf(s, size)));
