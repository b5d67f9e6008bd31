/** Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): ops that split and join channels, and that make keys and values per head. */
import { type Grads, op } from "./op.ts";

/** Splits the channels of each token: the first A, then R. */
export const split = op({
  name: "split",
  sig: "x[B,S,Y!] -> a[B,S,A!] b[B,S,R!]",
  gradOutputs: ["a", "b"],
  cpu({ x, a, b }, { B, S, Y, A, R }) {
    for (let t = 0; t < B * S; t++) {
      a.set(x.subarray(t * Y, t * Y + A), t * A);
      b.set(x.subarray(t * Y + A, t * Y + Y), t * R);
    }
  },
  grad: (_, { dys: [a, b] }, at): Grads => ({ x: join.of({ a: a!, b: b! }, at) }),
});
/** Concatenates A and R channels of each token. */
export const join = op({
  name: "join",
  sig: "a[B,S,A!] b[B,S,R!] -> y[B,S,Y!]",
  cpu({ a, b, y }, { B, S, Y, A, R }) {
    for (let t = 0; t < B * S; t++) {
      y.set(a.subarray(t * A, t * A + A), t * Y);
      y.set(b.subarray(t * R, t * R + R), t * Y + A);
    }
  },
  grad(_, { dy }, at): Grads {
    const { a, b } = split.all({ x: dy }, at);
    return { a, b };
  },
});

/**
 * Makes keys and values. The vector x of a head (Z = A + W channels) holds A channels of its key and the W channels of its value; the key
 * (Y = A + R) ends with the R channels of r, which all heads share.
 */
export const latentKv = op({
  name: "latent_kv",
  sig: "x[B,S,H*Z] r[B,S,R!] -> k[B,S,H*Y] v[B,S,H*W]",
  gradOutputs: ["k", "v"],
  cpu({ x, r, k, v }, { B, S, H, Z, R, Y, W }) {
    const A = Y - R;
    for (let h = 0; h < B * S * H; h++) {
      const t = Math.floor(h / H);
      k.set(x.subarray(h * Z, h * Z + A), h * Y);
      k.set(r.subarray(t * R, t * R + R), h * Y + A);
      v.set(x.subarray(h * Z + A, h * Z + Z), h * W);
    }
  },
  grad(_, { dys: [dk, dv] }, at): Grads {
    const { dx, dr } = latentKvGrad.all({ dk: dk!, dv: dv! }, at);
    return { x: dx, r: dr };
  },
});
/** The gradient of `latentKv`. */
export const latentKvGrad = op({
  name: "latent_kv_grad",
  sig: "dk[B,S,H*Y] dv[B,S,H*W] -> dx[B,S,H*Z] dr[B,S,R!]",
  cpu({ dk, dv, dx, dr }, { B, S, H, Z, R, Y, W }) {
    const A = Y - R;
    const sum = new Float64Array(dr.length);
    for (let h = 0; h < B * S * H; h++) {
      const t = Math.floor(h / H);
      dx.set(dk.subarray(h * Y, h * Y + A), h * Z);
      dx.set(dv.subarray(h * W, h * W + W), h * Z + A);
      for (let c = 0; c < R; c++) sum[t * R + c]! += dk[h * Y + A + c]!;
    }
    dr.set(sum);
  },
});
