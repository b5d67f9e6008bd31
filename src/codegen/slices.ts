/** Ops that only split and join vectors, as lists of slices to copy. All targets use the same lists. */

/** A copy of `length` channels of each head from one operand to another. */
export interface Slice {
  readonly from: string;
  readonly to: string;
  readonly length: number;
  /** The first channel within the vector of a head, in source and destination. */
  readonly fromAt: number;
  readonly toAt: number;
  /** Width of the vector of a head in source and destination. A `shared` source has one vector for all heads of a token. */
  readonly fromWidth: number;
  readonly toWidth: number;
  readonly shared?: true;
}
/** The slices of one op, copied for each token and head. */
export interface SliceCopy {
  readonly tokens: number;
  readonly heads: number;
  readonly slices: readonly Slice[];
}

type Sizes<Name extends string> = Readonly<Record<Name, number>>;

/** Returns the slices of `split`. */
export const splitSlices = ({ B, S, A, R, Y }: Sizes<"B" | "S" | "A" | "R" | "Y">): SliceCopy => ({
  ...{ tokens: B * S, heads: 1 },
  slices: [
    { from: "x", to: "a", length: A, fromAt: 0, toAt: 0, fromWidth: Y, toWidth: A },
    { from: "x", to: "b", length: R, fromAt: A, toAt: 0, fromWidth: Y, toWidth: R },
  ],
});

/** Returns the slices of `join`. */
export const joinSlices = ({ B, S, A, R, Y }: Sizes<"B" | "S" | "A" | "R" | "Y">): SliceCopy => ({
  ...{ tokens: B * S, heads: 1 },
  slices: [
    { from: "a", to: "y", length: A, fromAt: 0, toAt: 0, fromWidth: A, toWidth: Y },
    { from: "b", to: "y", length: R, fromAt: 0, toAt: A, fromWidth: R, toWidth: Y },
  ],
});

type HeadSizes = Sizes<"B" | "S" | "H" | "R" | "W" | "Y" | "Z">;

/** Returns the slices of `latent_kv`. */
export const latentKvSlices = ({ B, S, H, R, W, Y, Z }: HeadSizes): SliceCopy => ({
  ...{ tokens: B * S, heads: H },
  slices: [
    { from: "x", to: "k", length: Y - R, fromAt: 0, toAt: 0, fromWidth: Z, toWidth: Y },
    { from: "r", to: "k", length: R, fromAt: 0, toAt: Y - R, fromWidth: R, toWidth: Y, shared: true },
    { from: "x", to: "v", length: W, fromAt: Y - R, toAt: 0, fromWidth: Z, toWidth: W },
  ],
});

/** Returns the slices of `latent_kv_grad`; `dr` is not a copy but a sum over heads. */
export const latentKvGradSlices = ({ B, S, H, R, W, Y, Z }: HeadSizes): SliceCopy => ({
  ...{ tokens: B * S, heads: H },
  slices: [
    { from: "dk", to: "dx", length: Y - R, fromAt: 0, toAt: 0, fromWidth: Y, toWidth: Z },
    { from: "dv", to: "dx", length: W, fromAt: 0, toAt: Y - R, fromWidth: W, toWidth: Z },
  ],
});

/** A slice with the first of its channels among those of all slices. */
export interface PlacedSlice extends Slice {
  readonly begin: number;
  readonly end: number;
}
/** Returns the slices with their places among the channels of a head, and the number of channels. */
export function placed({ slices }: SliceCopy): { readonly placed: readonly PlacedSlice[]; readonly channels: number } {
  let channels = 0;
  const all = slices.map((s): PlacedSlice => {
    const begin = channels;
    channels += s.length;
    return { ...s, begin, end: channels };
  });
  return { placed: all, channels };
}
/** Returns the names of the operands that are copied from or to. */
export const operandsOfSlices = ({ slices }: SliceCopy): string[] => [...new Set(slices.flatMap((s) => [s.from, s.to]))];

/** Returns the offsets, lengths and widths that a vector width must divide. */
export const alignmentsOf = ({ slices }: SliceCopy): number[] =>
  slices.flatMap((p) => [p.length, p.fromAt, p.toAt, p.fromWidth, p.toWidth]).filter((n) => n > 0);
