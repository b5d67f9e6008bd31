/** Models of Hugging Face in tests of checkpoints: their parameters under rankc's names, their tensors, and small configs of every kind. */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { expect } from "vitest";
import { checkpointFor } from "../../runtime/checkpoint/hf.ts";
import { openSafetensors, type TensorEntry } from "../../runtime/checkpoint/safetensors.ts";
import { hasExperts } from "../../schemas/experts.ts";
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { importHf } from "../../src/convert/hf/importHf.ts";

export type Model = Job["model"];
export type Named = Map<string, { shape: readonly number[]; data: Float32Array }>;

export const fixture = (name: string): string => `test/fixtures/hf/${name}`;
export const imported = (config: unknown): Model => completeJob(JobText.parse(importHf(config, "a").job)).model;
export const modelOf = (name: string): Model => imported(JSON.parse(readFileSync(`${fixture(name)}/config.json`, "utf8")));
export const mixtral = modelOf("mixtral-tiny");
export const olmoe = modelOf("olmoe-tiny");

/** Our parameters, written out by hand for the models of this test. */
function shapes(m: Model): [string, number[]][] {
  const [D, Q, K] = [m.hidden, m.heads * m.head_dim, m.kv_heads * m.head_dim];
  const norms = m.qk_norm === "none" ? [] : m.qk_norm === "full" ? [Q, K] : [m.head_dim, m.head_dim];
  type Named = [string, number[]];
  const grouped: Named[] = [
    ["wq", [D, Q]],
    ["wk", [D, K]],
    ["wv", [D, K]],
    ["wo", [Q, D]],
    ...(m.qkv_bias
      ? ([
          ["bq", [Q]],
          ["bk", [K]],
          ["bv", [K]],
        ] as Named[])
      : []),
    ...norms.map((size, j): Named => [j === 0 ? "q_norm" : "k_norm", [size]]),
  ];
  const latent = ({ q_rank, kv_rank, nope_dim, rope_dim, v_dim }: NonNullable<Model["mla"]>): Named[] => [
    ...(q_rank === null
      ? ([["wq", [D, m.heads * (nope_dim + rope_dim)]]] as Named[])
      : ([
          ["wq_a", [D, q_rank]],
          ["q_norm", [q_rank]],
          ["wq_b", [q_rank, m.heads * (nope_dim + rope_dim)]],
        ] as Named[])),
    ["wkv_a", [D, kv_rank + rope_dim]],
    ["kv_norm", [kv_rank]],
    ["wkv_b", [kv_rank, m.heads * (nope_dim + v_dim)]],
    ["wo", [m.heads * v_dim, D]],
  ];
  const forward = (F: number, at = "", ...E: number[]): Named[] => [
    [`${at}w1`, [...E, D, F]],
    [`${at}w3`, [...E, D, F]],
    [`${at}w2`, [...E, F, D]],
  ];
  const sparse = ({ experts: E, ffn, router, shared }: NonNullable<Model["moe"]>): Named[] => [
    ["router", [D, E]],
    ...forward(ffn, "", E),
    ...(router.expert_bias ? [["router_bias", [E]] as Named] : []),
    ...(shared ? forward(shared.ffn, "shared.") : []),
    ...(shared?.gate ? [["shared.gate", [D, 1]] as Named] : []),
  ];
  const layers = Array.from({ length: m.layers }, (_, i) => {
    const all: Named[] = [
      ["norm1", [D]],
      ...(m.mla ? latent(m.mla) : grouped),
      ...(m.out_bias ? [["bo", [D]] as Named] : []),
      ["norm2", [D]],
      ...(m.moe && hasExperts(m, i) ? sparse(m.moe) : forward(m.ffn)),
    ];
    return all.map(([name, shape]): [string, number[]] => [`layers.${i}.${name}`, shape]);
  });
  return [
    ["embed", [m.vocab, D]],
    ...layers.flat(),
    ["norm", [D]],
    ...(m.tie_embeddings ? [] : [["head", [D, m.vocab]] as [string, number[]]]),
  ];
}

export const readAll = (model: Model, file: string): Named => {
  const checkpoint = checkpointFor(model, file);
  const named: Named = new Map(shapes(model).map(([name, shape]) => [name, { shape, data: checkpoint.read(name, shape) }]));
  expect(checkpoint.unused).toEqual([]);
  checkpoint.close();
  return named;
};
/** What a test compares: shapes, and the bytes as a digest. */
export const digests = (values: Iterable<readonly [string, { shape: readonly number[]; data: Float32Array }]>) =>
  [...values].map(([name, { shape, data }]) => [name, shape, createHash("sha256").update(data).digest("hex")]);
export const random = (model: Model): Named =>
  new Map(
    shapes(model).map(([name, shape]) => [
      name,
      { shape, data: Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, Math.random) },
    ]),
  );
export const entries = (file: string): TensorEntry[] => {
  const open = openSafetensors(file);
  const all = open.names.map((name): TensorEntry => ({ name, dtype: "F32", shape: open.info(name).shape, data: open.read(name) }));
  open.close();
  return all;
};
/** Returns a function that returns the message of the error of a body; `folder` is DIR in it. */
export const complaintsIn =
  (folder: string) =>
  (body: () => unknown): string => {
    try {
      body();
    } catch (error) {
      expect(error).toBeInstanceOf(Trouble);
      return (error as Trouble).message.replaceAll(folder, "DIR");
    }
    throw new Error("no error was thrown");
  };

/** The layouts of the Hub: one tensor an expert. */
export function perExpert(all: readonly TensorEntry[], names: { gate: string; up: string; down: string; router: string }): TensorEntry[] {
  return all.flatMap((entry) => {
    const [, layer, leaf] = /^(model\.layers\.\d+)\.mlp\.(.*)$/.exec(entry.name) ?? [];
    if (leaf === undefined || !/^gate\.weight$|^experts\.(gate_up|down)_proj$/.test(leaf)) return [entry];
    if (leaf === "gate.weight") return [{ ...entry, name: `${layer}.${names.router}.weight` }];
    const [E, out, input] = entry.shape as [number, number, number];
    const parts = leaf === "experts.down_proj" ? [names.down] : [names.gate, names.up];
    const size = (out / parts.length) * input;
    return Array.from({ length: E }, (_, e) =>
      parts.map(
        (part, i): TensorEntry => ({
          name: `${layer}.${part.replace("*", String(e))}.weight`,
          dtype: "F32",
          shape: [out / parts.length, input],
          data: entry.data.slice((e * parts.length + i) * size, (e * parts.length + i + 1) * size),
        }),
      ),
    ).flat();
  });
}
export const hubMixtral = {
  gate: "block_sparse_moe.experts.*.w1",
  up: "block_sparse_moe.experts.*.w3",
  down: "block_sparse_moe.experts.*.w2",
  router: "block_sparse_moe.gate",
};
export const hubOlmoe = {
  gate: "mlp.experts.*.gate_proj",
  up: "mlp.experts.*.up_proj",
  down: "mlp.experts.*.down_proj",
  router: "mlp.gate",
};

/** Configs of every kind of layer, as small as they may be. */
export const tiny = {
  ...{ hidden_size: 8, intermediate_size: 12, num_hidden_layers: 3, vocab_size: 10, num_attention_heads: 2, max_position_embeddings: 16 },
  ...{ num_experts: 4, n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 5 },
};
const lowRank = { kv_lora_rank: 6, qk_nope_head_dim: 3, qk_rope_head_dim: 2, v_head_dim: 5, n_group: 2, topk_group: 1 };
export const kinds: Readonly<Record<string, object>> = {
  "Llama with biases": { model_type: "llama", attention_bias: true, num_key_value_heads: 1 },
  "Qwen2-MoE": { model_type: "qwen2_moe", num_key_value_heads: 1, shared_expert_intermediate_size: 7 },
  "Qwen3-MoE with dense layers": { model_type: "qwen3_moe", num_key_value_heads: 1, head_dim: 6, mlp_only_layers: [1] },
  "DeepSeek-V3": { model_type: "deepseek_v3", ...lowRank, q_lora_rank: 4, n_shared_experts: 2, first_k_dense_replace: 1 },
  "DeepSeek-V2 without a query latent": { model_type: "deepseek_v2", ...lowRank, q_lora_rank: null, first_k_dense_replace: 0 },
};
