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

type Sizes = Readonly<Record<string, number>>;
const sizes = (d: Sizes) => d as Readonly<Record<"B" | "S" | "H" | "A" | "R" | "W" | "Y" | "Z", number>>;

/** Slices by op name. */
export const sliceCopies: Readonly<Record<string, (d: Sizes) => SliceCopy>> = {
  split(d) {
    const { B, S, A, R, Y } = sizes(d);
    return {
      ...{ tokens: B * S, heads: 1 },
      slices: [
        { from: "x", to: "a", length: A, fromAt: 0, toAt: 0, fromWidth: Y, toWidth: A },
        { from: "x", to: "b", length: R, fromAt: A, toAt: 0, fromWidth: Y, toWidth: R },
      ],
    };
  },
  join(d) {
    const { B, S, A, R, Y } = sizes(d);
    return {
      ...{ tokens: B * S, heads: 1 },
      slices: [
        { from: "a", to: "y", length: A, fromAt: 0, toAt: 0, fromWidth: A, toWidth: Y },
        { from: "b", to: "y", length: R, fromAt: 0, toAt: A, fromWidth: R, toWidth: Y },
      ],
    };
  },
  latent_kv(d) {
    const { B, S, H, R, W, Y, Z } = sizes(d);
    const own = Y - R;
    return {
      ...{ tokens: B * S, heads: H },
      slices: [
        { from: "x", to: "k", length: own, fromAt: 0, toAt: 0, fromWidth: Z, toWidth: Y },
        { from: "r", to: "k", length: R, fromAt: 0, toAt: own, fromWidth: R, toWidth: Y, shared: true },
        { from: "x", to: "v", length: W, fromAt: own, toAt: 0, fromWidth: Z, toWidth: W },
      ],
    };
  },
  /** `dr` is not a copy: it is a sum over heads. */
  latent_kv_grad(d) {
    const { B, S, H, R, W, Y, Z } = sizes(d);
    const own = Y - R;
    return {
      ...{ tokens: B * S, heads: H },
      slices: [
        { from: "dk", to: "dx", length: own, fromAt: 0, toAt: 0, fromWidth: Y, toWidth: Z },
        { from: "dv", to: "dx", length: W, fromAt: 0, toAt: own, fromWidth: W, toWidth: Z },
      ],
    };
  },
};

/** Returns the offsets, lengths and widths that a vector width must divide. */
export const alignmentsOf = ({ slices }: SliceCopy): number[] =>
  slices.flatMap((p) => [p.length, p.fromAt, p.toAt, p.fromWidth, p.toWidth]).filter((n) => n > 0);
