/**
 * buildModel: the forward pass of a decoder-only transformer, dense or mixture of experts, and its losses.
 * It says where parameters are cut and how the first activation lies; nothing else about the mesh. Weights are [in, out].
 *
 * Letters: B sequences of one microbatch on all data-parallel ranks, S tokens, D hidden, V vocabulary, E experts, F ffn,
 * G key/value heads, M query heads per key/value head, C head size.
 */
import type { Job } from "../schemas/job.ts";
import { attention, rope } from "./ops/attention.ts";
import { add, gemm, gemmDgrad, groupedGemm } from "./ops/linear.ts";
import { auxLoss, pack, permute, softmax, swiglu, swigluRows, tally, topK, unpermute, zLoss } from "./ops/moe.ts";
import { headNorm, rmsnorm } from "./ops/norm.ts";
import type { Leaf, Value } from "./ops/op.ts";
import { embed, mean, nll, pick, rowMax, sumExp } from "./ops/vocab.ts";

export interface Loss {
  /** `loss` is the cross-entropy people watch; `aux_loss` what balancing adds. Equal names are added up. */
  readonly name: "loss" | "aux_loss";
  readonly value: Value;
}

export function buildModel({ model: m, parallel, train }: Job): Loss[] {
  const type = train.precision === "bf16" ? "bf16" : "f32";
  const B = train.micro_batch * parallel.data;
  const S = m.seq;
  const head = { C: m.head_dim, M: m.heads / m.kv_heads };
  const size: Record<string, number> = {
    B,
    S,
    D: m.hidden,
    V: m.vocab,
    Q: m.heads * m.head_dim,
    KV: m.kv_heads * m.head_dim,
    C: m.head_dim,
    F: m.moe ? m.moe.ffn : m.ffn,
    E: m.moe?.experts ?? 0,
  };
  /** `D,F@etp`: a dim and the axes that cut it, outermost first. */
  const leaf = (dims: string, of: Leaf, dtype: Value["dtype"]): Value => {
    const slots = dims.split(",").map((d) => d.split("@"));
    return { out: 0, leaf: of, ragged: 0, fanout: 0, dtype, sizes: slots.map(([d]) => size[d!]!), cut: slots.map(([, ...axes]) => axes) };
  };
  const input = (name: string, layer: number) => leaf("B@dp,S@cp", { kind: "input", name, layer }, "i32");
  const weight = (name: string, dims: string, layer: number) =>
    leaf(dims, { kind: "parameter", name, layer, init: { type: "normal", std: train.init_std } }, type);
  const gain = (name: string, dims: string, layer: number) =>
    leaf(dims, { kind: "parameter", name, layer, init: { type: "ones", std: 0 } }, type);

  const last = m.layers - 1;
  const eps = m.norm.eps;
  const table = weight("embed", "V@tp,D", 0);
  let x = embed.of({ ids: input("ids", 0), table }, {}, "embedding");
  x.cut = [["dp"], parallel.sequence ? ["cp", "tp"] : ["cp"], []];

  const losses: Loss[] = [];
  for (let i = 0; i < m.layers; i++) {
    const at = (name: string) => `layers.${i}.${name}`;
    const a = rmsnorm.of({ x, gain: gain(at("norm1"), "D", i) }, { eps }, at("attn.norm"));
    const projected = (name: string, dims: string) => gemm.of({ x: a, w: weight(at(name), dims, i) }, {}, at(`attn.${name}`));
    const positioned = (name: string, y: Value) =>
      rope.of({ x: y }, { C: m.head_dim, theta: m.rope.theta, sign: 1 }, at(`attn.${name}_rope`));
    const normed = (name: string, dims: string, y: Value) =>
      m.qk_norm === "none"
        ? y
        : m.qk_norm === "full"
          ? rmsnorm.of({ x: y, gain: gain(at(name), dims, i) }, { eps }, at(`attn.${name}`))
          : headNorm.of({ x: y, gain: gain(at(name), "C", i) }, { C: m.head_dim, eps }, at(`attn.${name}`));
    const q = positioned("q", normed("q_norm", "Q", projected("wq", "D,Q@tp")));
    const k = positioned("k", normed("k_norm", "KV", projected("wk", "D,KV@tp")));
    const mixed = attention.of({ q, k, v: projected("wv", "D,KV@tp") }, head, at("attn.core"));
    x = add.of({ a: x, b: gemm.of({ x: mixed, w: weight(at("wo"), "Q@tp,D", i) }, {}, at("attn.wo")) }, {}, at("attn.residual"));

    const h = rmsnorm.of({ x, gain: gain(at("norm2"), "D", i) }, { eps }, at("mlp.norm"));
    x = add.of({ a: x, b: m.moe ? experts(h, i, m.moe) : dense(h, i) }, {}, at("mlp.residual"));
  }

  const y = rmsnorm.of({ x, gain: gain("norm", "D", last) }, { eps }, "final.norm");
  // a tied table that both the first and the last stage use stands on both
  const tied = parallel.pipeline > 1 ? leaf("V@tp,D", { ...table.leaf!, layer: last, tiedTo: table }, type) : table;
  const logits = m.tie_embeddings
    ? gemmDgrad.of({ dy: y, w: tied }, {}, "logits")
    : gemm.of({ x: y, w: weight("head", "D,V@tp", last) }, {}, "logits");
  // cross-entropy over a vocabulary shard: log Σ exp(x - max) + max - x[target]
  const max = rowMax.of({ x: logits }, {}, "loss.max");
  const s = sumExp.of({ x: logits, m: max }, {}, "loss.sum_exp");
  const p = pick.of({ x: logits, target: input("labels", last) }, {}, "loss.pick");
  const nllOfToken = nll.of({ m: max, s, p }, {}, "loss.nll");
  losses.push({ name: "loss", value: mean.of({ l: nllOfToken }, { count: train.global_batch * S }, "loss") });
  return losses;

  function dense(h: Value, i: number): Value {
    const w = (name: string, dims: string, y: Value) =>
      gemm.of({ x: y, w: weight(`layers.${i}.${name}`, dims, i) }, {}, `layers.${i}.mlp.${name}`);
    const act = swiglu.of({ gate: w("w1", "D,F@tp", h), up: w("w3", "D,F@tp", h) }, {}, `layers.${i}.mlp.swiglu`);
    return w("w2", "F@tp,D", act);
  }

  /** router → permute → grouped GEMMs → unpermute. Dispatch and combine are moves that `shard` inserts between them. */
  function experts(h: Value, i: number, moe: NonNullable<typeof m.moe>): Value {
    const at = (name: string) => `layers.${i}.moe.${name}`;
    const { router } = moe;
    const routing = { k: moe.top_k };
    // the dispatcher `all_gather`: tokens are gathered over ep, and each rank permutes those of its own experts
    const pin = (v: Value) => {
      if (moe.dispatch === "all_gather") v.node!.pin = { dim: "E", axis: "ep", path: "model.moe.dispatch" };
      return v;
    };
    const logits = gemm.of({ x: h, w: weight(`layers.${i}.router`, "D,E", i) }, {}, at("router"));
    const scores = softmax.of({ x: logits }, {}, at("scores"));
    const probs = topK.of({ p: scores }, { k: moe.top_k, normalize: Number(router.normalize_top_k) }, at("top_k"));
    const rows = pin(permute.of({ x: h, p: probs }, routing, at("permute")));
    const w = (name: string, dims: string, r: Value) => groupedGemm.of({ x: r, w: weight(`layers.${i}.${name}`, dims, i) }, {}, at(name));
    // the router's weight travels beside the row and is applied inside the activation, as Megatron Core does
    const weights = pin(pack.of({ p: probs }, routing, at("pack")));
    const act = swigluRows.of({ gate: w("w1", "E@ep,D,F@etp", rows), up: w("w3", "E@ep,D,F@etp", rows), p: weights }, {}, at("swiglu"));
    const out = pin(unpermute.of({ r: w("w2", "E@ep,F@etp,D", act), p: probs }, routing, at("unpermute")));

    const microbatches = train.global_batch / train.micro_batch;
    if (router.balance === "aux_loss" && router.aux_coeff > 0) {
      // Switch, GShard: coeff · E/(k·T²) · Σ_e n_e · Σ_t p_te with T the tokens of one microbatch, averaged over microbatches
      const T = train.micro_batch * S;
      const c = (router.aux_coeff * moe.experts) / (moe.top_k * T * T * microbatches);
      const n = tally.of({ p: probs }, { P: train.micro_batch }, at("tally"));
      losses.push({ name: "aux_loss", value: auxLoss.of({ p: scores, n }, { P: train.micro_batch, c }, at("aux_loss")) });
    }
    if (router.z_coeff > 0)
      losses.push({ name: "aux_loss", value: zLoss.of({ x: logits }, { c: router.z_coeff / (train.global_batch * S) }, at("z_loss")) });
    return out;
  }
}
