/** Declarations of ops: what is derived from a signature, and that the law of shards finds a wrong signature. */
import { describe, expect, test } from "vitest";
import { transportOps } from "../../schemas/effects.ts";
import { attention } from "../../src/ops/attention.ts";
import * as balance from "../../src/ops/balance.ts";
import { gatedUnits } from "../../src/ops/gatedUnits.ts";
import { add, groupedGemm } from "../../src/ops/gemm.ts";
import { ops } from "../../src/ops/index.ts";
import * as moe from "../../src/ops/moe.ts";
import { rmsnorm } from "../../src/ops/norm.ts";
import { type AnyOp, op, type ShardContext, type Value } from "../../src/ops/op.ts";
import * as transport from "../../src/ops/rearrange.ts";
import { rope } from "../../src/ops/rope.ts";
import * as router from "../../src/ops/router.ts";
import * as vocab from "../../src/ops/vocab.ts";
import { cutError, cuttable, makeCase } from "../support/opCases.ts";

const local = (p: ShardContext): ShardContext => ({ rows: p.rows, start: () => 0 });

describe("a signature that lies is caught", () => {
  const lies: Record<string, AnyOp> = {
    "a norm that may be cut in its width": op({ name: "rmsnorm", sig: "x[B,S,D] gain[D] -> y[B,S,D]", cpu: rmsnorm.cpu }),
    "attention over a piece of the keys": op({
      name: "attention",
      sig: "q[B,S,G*M*C] k[B,U,G*C] v[B,U,G*W] -> o[B,S,G*M*W] lse[B,S,G*M]",
      cpu: attention.cpu,
    }),
    "a maximum whose pending reduction is a sum": op({ name: "row_max", sig: "x[B,S,V] -> m[B,S]", cpu: vocab.rowMax.cpu }),
    "a sum whose pending reduction is a maximum": op({
      name: "expert_counts",
      sig: "c[A*P,S,E] -> n[A,E]",
      reduction: "max",
      cpu: balance.expertCounts.cpu,
    }),
    "a mean over the tokens that are here": op({
      name: "mean",
      sig: "l[B,S] -> y[]",
      cpu({ l, y }) {
        for (const x of l) y[0]! += x / l.length;
      },
    }),
    "positions counted from the piece's first token": op({
      name: "rope",
      sig: "x[B,S,H*C] -> y[B,S,H*C]",
      cpu: (t, d, p) => rope.cpu(t, d, local(p)),
    }),
    "a causal mask that starts with the piece": op({
      name: "attention",
      sig: "q[B,S,G*M*C] k[B,U!,G*C] v[B,U!,G*W] -> o[B,S,G*M*W] lse[B,S,G*M]",
      cpu: (t, d, p) => attention.cpu(t, d, local(p)),
    }),
    "ids counted from the piece of the vocabulary": op({
      name: "embed",
      sig: "ids[B,S] table[V,D] -> x[B,S,D]",
      cpu: (t, d, p) => vocab.embed.cpu(t, d, local(p)),
    }),
    "a softmax over some of the experts": op({ name: "softmax", sig: "x[B,S,E] -> y[B,S,E]", cpu: router.softmax.cpu }),
    "the square of a sum over some of the experts": op({ name: "z_loss", sig: "x[B,S,E] -> y[]", cpu: router.zLoss.cpu }),
    "a balancing loss with the counts of the tokens that are here": op({
      name: "aux_loss",
      sig: "p[A*P,S,E] -> y[]",
      cpu({ p, y }, { A, P, S, E }, place) {
        const n = new Float32Array(A * E);
        balance.expertCounts.cpu({ c: p, n }, { A, P, S, E }, place);
        balance.auxLoss.cpu({ p, n, y }, { A, P, S, E, c: 1 }, place);
      },
    }),
    "experts counted from the job's first": op({
      name: "grouped_gemm",
      sig: "x[B~S~E,K] w[E,K,N] -> y[B~S~E,N]",
      cpu: (t, d, p) => groupedGemm.cpu(t, d, local(p)),
    }),
    "rows named by the piece's own coordinates": op({
      name: "permute",
      sig: "x[B,S,D] c[B,S,E] -> r[B~S~E,D]",
      rows: (t, d, p, rows, bound) => moe.permute.rows!(t, d, local(p), rows, bound),
      cpu: moe.permute.cpu,
    }),
    "an activation divided by the width that is here": op({
      name: "swiglu_rows",
      sig: "gate[B~S~E,F] up[B~S~E,F] p[B~S~E] -> y[B~S~E,F]",
      cpu(t, d, p) {
        gatedUnits.swiglu.rows.cpu(t, d, p);
        for (let i = 0; i < t.y.length; i++) t.y[i]! /= d.F;
      },
    }),
  };
  test.each(Object.entries(lies))("%s", (_, lie) => {
    const c = makeCase(lie, 3);
    expect(Math.max(...cuttable(c).map((dim) => cutError(c, dim, 1)))).toBeGreaterThan(1e-3);
  });
});

test("the table has each op once, under its name in plans", () => {
  for (const [name, o] of Object.entries(ops)) expect(o.name).toBe(name);
  expect(Object.keys(ops).filter((n) => !/^[a-z_]+$/.test(n))).toEqual([]);
  expect(Object.keys(ops).join(" ")).toMatchInlineSnapshot(
    `"gemm gemm_dgrad gemm_wgrad grouped_gemm grouped_dgrad grouped_wgrad add accumulate cast add_bias bias_grad add_bias_rows bias_rows_grad rmsnorm rmsnorm_grad head_norm head_norm_grad layernorm layernorm_grad head_layernorm head_layernorm_grad rope rope_documents attention attention_grad attention_part attention_part_grad attention_merge attention_dropout attention_dropout_grad attention_dropout_part attention_dropout_part_grad dropout jitter attention_documents attention_documents_grad attention_documents_part attention_documents_part_grad attention_dropout_documents attention_dropout_documents_grad attention_dropout_documents_part attention_dropout_documents_part_grad split join latent_kv latent_kv_grad embed embed_grad row_max softmax_terms softmax_terms_grad nll nll_grad mean mean_grad weighted_sum source_losses weighted_sum_grad softmax softmax_grad sigmoid sigmoid_grad sqrt_softplus sqrt_softplus_grad normalize normalize_grad top_k_mask top_k_mask_biased combine_weights combine_weights_grad z_loss z_loss_grad router_entropy expert_counts aux_loss aux_loss_grad running_mean global_aux_loss global_aux_loss_grad sinkhorn quantile quantile_update expert_load expert_loads bias_update apply_capacity dropped_rows expert_choice_mask uniform_mask permute unpermute pack pack_grad sigmoid_gate sigmoid_gate_grad group_mask mark_weights mark_weights_grad pack_groups pack_groups_grad row_choices permute_rows unpermute_rows pack_rows pack_rows_grad pack_row_groups pack_row_groups_grad swiglu swiglu_grad swiglu_rows swiglu_rows_grad geglu geglu_grad geglu_rows geglu_rows_grad quick_geglu quick_geglu_grad quick_geglu_rows quick_geglu_rows_grad gelu gelu_grad gelu_rows gelu_rows_grad gelu_tanh gelu_tanh_grad gelu_tanh_rows gelu_tanh_rows_grad squared_relu squared_relu_grad squared_relu_rows squared_relu_rows_grad sum_squares mark_nonfinite clip clip_scaled adamw adamw_cast adamw_scheduled adam adam_cast adam_scheduled sgd sgd_cast sgd_scheduled sgd_scheduled_cast sgd_momentum sgd_momentum_cast sgd_momentum_scheduled sgd_momentum_scheduled_cast muon_momentum orthogonalize orthogonalize_experts muon muon_scheduled gemm_dgrad_pair gemm_dgrad_triple grouped_dgrad_pair gemm_pair gemm_wgrad_pair grouped_wgrad_pair swiglu_grad_again swiglu_rows_grad_again gemm_swiglu grouped_gemm_swiglu gemm_dgrad_swiglu grouped_dgrad_swiglu unpermute_add rmsnorm_grad_add rmsnorm_sum rmsnorm_sum_triple rmsnorm_grad_add_pair rmsnorm_grad_add_triple head_norm_rope head_norm_rope_grad softmax_statistics arrange take_rows invert_rows split_rows merge_rows"`,
  );
});

test("the ops around a collective are those of rearrange.ts", () => {
  expect(transportOps).toEqual(Object.values(transport).flatMap((o) => (typeof o === "object" ? o.name : [])));
});

test("the dims along which each op may be sharded", () => {
  const text = Object.values(ops).map((o) => `${o.name}: ${cuttable(o).join(" ")}${o.reduction ? ` (${o.reduction})` : ""}`);
  expect(text.join("\n")).toMatchInlineSnapshot(`
    "gemm: B S K N
    gemm_dgrad: B S N K
    gemm_wgrad: B S K N
    grouped_gemm: B S E K N
    grouped_dgrad: B S E N K
    grouped_wgrad: B S E K N
    add: ...
    accumulate: ...
    cast: ...
    add_bias: B S N
    bias_grad: B S N
    add_bias_rows: B S E N
    bias_rows_grad: B S E N
    rmsnorm: B S
    rmsnorm_grad: B S
    head_norm: B S H
    head_norm_grad: B S H
    layernorm: B S
    layernorm_grad: B S
    head_layernorm: B S H
    head_layernorm_grad: B S H
    rope: B S H
    rope_documents: B S H
    attention: B S G
    attention_grad: B S G
    attention_part: B S G U (merge)
    attention_part_grad: B S G U
    attention_merge: B S H
    attention_dropout: B S G
    attention_dropout_grad: B S G
    attention_dropout_part: B S G U (merge)
    attention_dropout_part_grad: B S G U
    dropout: B S
    jitter: B S
    attention_documents: B S G
    attention_documents_grad: B S G
    attention_documents_part: B S G U (merge)
    attention_documents_part_grad: B S G U
    attention_dropout_documents: B S G
    attention_dropout_documents_grad: B S G
    attention_dropout_documents_part: B S G U (merge)
    attention_dropout_documents_part_grad: B S G U
    split: B S
    join: B S
    latent_kv: B S H
    latent_kv_grad: B S H
    embed: B S V D
    embed_grad: B S V D
    row_max: B S V (max)
    softmax_terms: B S V
    softmax_terms_grad: B S V
    nll: B S
    nll_grad: B S
    mean: B S
    mean_grad: B S
    weighted_sum: B S
    source_losses: B S
    weighted_sum_grad: B S
    softmax: B S
    softmax_grad: B S
    sigmoid: B S E
    sigmoid_grad: B S E
    sqrt_softplus: B S E
    sqrt_softplus_grad: B S E
    normalize: B S
    normalize_grad: B S
    top_k_mask: B S
    top_k_mask_biased: B S
    combine_weights: B S
    combine_weights_grad: B S
    z_loss: B S
    z_loss_grad: B S
    router_entropy: B S
    expert_counts: A S E
    aux_loss: A S E
    aux_loss_grad: A S E
    running_mean: 
    global_aux_loss: B S E
    global_aux_loss_grad: B S E
    sinkhorn: A (max)
    quantile: A
    quantile_update: 
    expert_load: B S E
    expert_loads: B S E T
    bias_update: 
    apply_capacity: A J E
    dropped_rows: B S E
    expert_choice_mask: A E
    uniform_mask: B S E
    permute: B S D E
    unpermute: B S E D
    pack: B S E
    pack_grad: B S E
    sigmoid_gate: B S N
    sigmoid_gate_grad: B S N
    group_mask: B S G
    mark_weights: B S E
    mark_weights_grad: B S E
    pack_groups: B S E
    pack_groups_grad: B S E
    row_choices: B S E N
    permute_rows: B D
    unpermute_rows: B D
    pack_rows: B
    pack_rows_grad: B
    pack_row_groups: B
    pack_row_groups_grad: B
    swiglu: B S F
    swiglu_grad: B S F
    swiglu_rows: B S E F
    swiglu_rows_grad: B S E F
    geglu: B S F
    geglu_grad: B S F
    geglu_rows: B S E F
    geglu_rows_grad: B S E F
    quick_geglu: B S F
    quick_geglu_grad: B S F
    quick_geglu_rows: B S E F
    quick_geglu_rows_grad: B S E F
    gelu: B S F
    gelu_grad: B S F
    gelu_rows: B S E F
    gelu_rows_grad: B S E F
    gelu_tanh: B S F
    gelu_tanh_grad: B S F
    gelu_tanh_rows: B S E F
    gelu_tanh_rows_grad: B S E F
    squared_relu: B S F
    squared_relu_grad: B S F
    squared_relu_rows: B S E F
    squared_relu_rows_grad: B S E F
    sum_squares: ...
    mark_nonfinite: 
    clip: 
    clip_scaled: 
    adamw: ...
    adamw_cast: ...
    adamw_scheduled: ...
    adam: ...
    adam_cast: ...
    adam_scheduled: ...
    sgd: ...
    sgd_cast: ...
    sgd_scheduled: ...
    sgd_scheduled_cast: ...
    sgd_momentum: ...
    sgd_momentum_cast: ...
    sgd_momentum_scheduled: ...
    sgd_momentum_scheduled_cast: ...
    muon_momentum: ...
    orthogonalize: 
    orthogonalize_experts: E
    muon: ...
    muon_scheduled: ...
    gemm_dgrad_pair: B S K
    gemm_dgrad_triple: B S K
    grouped_dgrad_pair: B S E K
    gemm_pair: B S K N
    gemm_wgrad_pair: B S K N
    grouped_wgrad_pair: B S E K N
    swiglu_grad_again: B S F
    swiglu_rows_grad_again: B S E F
    gemm_swiglu: B S N
    grouped_gemm_swiglu: B S E N
    gemm_dgrad_swiglu: B S K
    grouped_dgrad_swiglu: B S E K
    unpermute_add: B S D
    rmsnorm_grad_add: B S
    rmsnorm_sum: B S
    rmsnorm_sum_triple: B S
    rmsnorm_grad_add_pair: B S
    rmsnorm_grad_add_triple: B S
    head_norm_rope: B S H
    head_norm_rope_grad: B S H
    softmax_statistics: B S
    arrange: 
    take_rows: 
    invert_rows: 
    split_rows: 
    merge_rows: "
  `);
});

const input = (name: string, ...sizes: number[]): Value => ({
  ...{ out: 0, ragged: 0, fanout: 0, dtype: "f32", leaf: { kind: "input", name, position: 2 } },
  sizes,
});
const product = op({ name: "gemm", sig: "x[B,K] w[K,N] -> y[B,N]", cpu: () => {} });

test("a signature is read by TypeScript too: a wrong name or dim does not compile", () => {
  const [x, w] = [input("x", 2, 3), input("w", 3, 4)];
  expect(product.of({ x, w }).sizes).toEqual([2, 4]);
  // @ts-expect-error: there is no argument v
  expect(() => product.of({ x, v: w })).toThrow();
  // @ts-expect-error: there is no output z
  expect(product.all({ x, w }).z).toBeUndefined();
  // @ts-expect-error: there is no argument v to compute from
  op({ name: "cast", sig: "x[B,K] -> y[B,K]", cpu: ({ v, y }) => y.set(v) });
});

test("shapes that disagree throw with the place", () => {
  expect(() => product.of({ x: input("x", 2, 3), w: input("w", 5, 4) })).toThrow("gemm.w: K is 3 and 5");
  expect(() => product.of({ x: input("x", 2, 3), w: input("w", 3) })).toThrow("gemm.w: 1 dims where the signature has 2");
  const heads = op({ name: "rope", sig: "x[B,H*C] -> y[B,H*C]", cpu: () => {} });
  expect(() => heads.of({ x: input("x", 2, 6) }, { C: 4 })).toThrow("rope.x: H is 1.5");
});

test("an inner factor comes from the attributes, and its dim from what is left of the size", () => {
  const o = attention.of(
    { q: input("q", 1, 4, 24), k: input("k", 1, 4, 12), v: input("v", 1, 4, 15) },
    { M: 2, C: 4, W: 5, scale: 1, chunk: 0, ranks: 1 },
  );
  expect(o.node!.size).toMatchObject({ G: 3, S: 4, U: 4 });
  expect(o.sizes).toEqual([1, 4, 30]);
});

test("a ragged value has its rows first and keeps the number of rows per token", () => {
  const r = moe.permute.of({ x: input("x", 2, 4, 6), c: input("c", 2, 4, 8) }, { k: 2 });
  expect([r.sizes, r.ragged, r.fanout]).toEqual([[2, 4, 8, 6], 3, 2]);
  const y = add.of({ a: r, b: r });
  expect([y.sizes, y.ragged, y.fanout]).toEqual([[2, 4, 8, 6], 3, 2]);
});

test("an output has the type of the first operand that is not made of ids, unless declared", () => {
  const ids: Value = { ...input("ids", 2, 4), dtype: "i32" };
  const table: Value = { ...input("table", 9, 6), dtype: "bf16" };
  const x = vocab.embed.of({ ids, table });
  expect(x.dtype).toBe("bf16");
  expect(vocab.embedGrad.of({ ids, table, dy: x }).dtype).toBe("f32");
});
