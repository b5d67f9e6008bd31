/** Ops that only cut vectors apart and put them together, as pieces that are copied: the same list for every target. */

/** So many channels of each head, from one operand to another. */
export interface Slice {
  readonly from: string;
  readonly to: string;
  readonly length: number;
  /** The first channel of either, within a head's vector. */
  readonly fromAt: number;
  readonly toAt: number;
  /** Width of a head's vector in either. A source that all heads of a token share has one vector for all of them. */
  readonly fromWidth: number;
  readonly toWidth: number;
  readonly shared?: true;
}
export interface SliceCopy {
  readonly tokens: number;
  readonly heads: number;
  readonly slices: readonly Slice[];
}

type Sizes = Readonly<Record<string, number>>;
const sizes = (d: Sizes) => d as Readonly<Record<"B" | "S" | "H" | "A" | "R" | "W" | "Y" | "Z", number>>;

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
  /** Beside these, `dr` is a sum over heads. */
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

/** Offsets and lengths that a vector of elements must divide. */
export const alignmentsOf = ({ slices }: SliceCopy): number[] =>
  slices.flatMap((p) => [p.length, p.fromAt, p.toAt, p.fromWidth, p.toWidth]).filter((n) => n > 0);
