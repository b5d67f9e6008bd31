import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { checkpointFor, toHuggingFace } from "../../runtime/checkpoint/hf.ts";
import { openSafetensors, type TensorEntry, writeSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { hasExperts } from "../../schemas/experts.ts";
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { importHf } from "../../src/convert/hf/importHf.ts";
import { references } from "../support/referenceJobs.ts";

type Model = Job["model"];
type Named = Map<string, { shape: readonly number[]; data: Float32Array }>;

const folder = mkdtempSync(join(tmpdir(), "rankc-checkpoint-"));
afterAll(() => rmSync(folder, { recursive: true }));

const fixture = (name: string): string => `test/fixtures/hf/${name}`;
const imported = (config: unknown): Model => completeJob(JobText.parse(importHf(config, "a").job)).model;
const modelOf = (name: string): Model => imported(JSON.parse(readFileSync(`${fixture(name)}/config.json`, "utf8")));
const mixtral = modelOf("mixtral-tiny");
const olmoe = modelOf("olmoe-tiny");

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

const readAll = (model: Model, file: string): Named => {
  const checkpoint = checkpointFor(model, file);
  const named: Named = new Map(shapes(model).map(([name, shape]) => [name, { shape, data: checkpoint.read(name, shape) }]));
  expect(checkpoint.unused).toEqual([]);
  checkpoint.close();
  return named;
};
/** What a test compares: shapes, and the bytes as a digest. */
const digests = (values: Iterable<readonly [string, { shape: readonly number[]; data: Float32Array }]>) =>
  [...values].map(([name, { shape, data }]) => [name, shape, createHash("sha256").update(data).digest("hex")]);
const random = (model: Model): Named =>
  new Map(
    shapes(model).map(([name, shape]) => [
      name,
      { shape, data: Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, Math.random) },
    ]),
  );
const entries = (file: string): TensorEntry[] => {
  const open = openSafetensors(file);
  const all = open.names.map((name): TensorEntry => ({ name, dtype: "F32", shape: open.info(name).shape, data: open.read(name) }));
  open.close();
  return all;
};
function complaint(body: () => unknown): string {
  try {
    body();
  } catch (error) {
    expect(error).toBeInstanceOf(Trouble);
    return (error as Trouble).message.replaceAll(folder, "DIR");
  }
  throw new Error("nothing was said");
}

test.each(references)("%s: read as rankc's parameters and written back, weights and gradients are equal", (name) => {
  const model = modelOf(name);
  for (const file of ["model", "grads"]) {
    const path = `${fixture(name)}/${file}.safetensors`;
    // a bias of the choice has no gradient
    const stateless = { ...model, moe: model.moe && { ...model.moe, router: { ...model.moe.router, expert_bias: false } } };
    const back = toHuggingFace(model, readAll(file === "grads" ? stateless : model, path));
    // transformers saves one tensor an expert, and has them in one while it runs
    const byName = (all: readonly TensorEntry[]) =>
      digests(perExpert(all, hubOlmoe).map((entry) => [entry.name, entry] as const)).sort(([a], [b]) => (a! < b! ? -1 : 1));
    expect(byName(back)).toEqual(byName(entries(path)));
  }
});

test("a linear layer is transposed, gate and up are the halves of the fused tensor, experts stay apart", () => {
  const named = readAll(mixtral, fixture("mixtral-tiny"));
  const file = openSafetensors(`${fixture("mixtral-tiny")}/model.safetensors`);
  const [D, F, C, e, d, f] = [64, 96, 32, 5, 17, 31];
  expect(named.get("layers.1.wk")!.data[d * C + f]).toBe(file.read("model.layers.1.self_attn.k_proj.weight")[f * D + d]);
  const fused = file.read("model.layers.1.mlp.experts.gate_up_proj");
  expect(named.get("layers.1.w1")!.data[(e * D + d) * F + f]).toBe(fused[(e * 2 * F + f) * D + d]);
  expect(named.get("layers.1.w3")!.data[(e * D + d) * F + f]).toBe(fused[(e * 2 * F + F + f) * D + d]);
  const down = file.read("model.layers.1.mlp.experts.down_proj");
  expect(named.get("layers.1.w2")!.data[(e * F + f) * D + d]).toBe(down[(e * D + d) * F + f]);
  file.close();
});

/** The layouts of the Hub: one tensor an expert. */
function perExpert(all: readonly TensorEntry[], names: { gate: string; up: string; down: string; router: string }): TensorEntry[] {
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
const hubMixtral = {
  gate: "block_sparse_moe.experts.*.w1",
  up: "block_sparse_moe.experts.*.w3",
  down: "block_sparse_moe.experts.*.w2",
  router: "block_sparse_moe.gate",
};
const hubOlmoe = { gate: "mlp.experts.*.gate_proj", up: "mlp.experts.*.up_proj", down: "mlp.experts.*.down_proj", router: "mlp.gate" };

test.each([
  ["mixtral-tiny", mixtral, hubMixtral],
  ["olmoe-tiny", olmoe, hubOlmoe],
] as const)("%s: per-expert tensors of the Hub, whole or in shards, are the same parameters", (name, model, names) => {
  const parts = perExpert(entries(`${fixture(name)}/model.safetensors`), names);
  const whole = join(folder, `${name}.safetensors`);
  writeSafetensors(whole, parts);
  const expected = digests(readAll(model, fixture(name)));
  expect(digests(readAll(model, whole))).toEqual(expected);

  const sharded = join(folder, name);
  mkdirSync(sharded);
  const shards = ["a.safetensors", "b.safetensors"];
  shards.forEach((shard, k) => {
    writeSafetensors(
      join(sharded, shard),
      parts.filter((_, i) => i % 2 === k),
    );
  });
  const index = { weight_map: Object.fromEntries(parts.map((part, i) => [part.name, shards[i % 2]])) };
  writeFileSync(join(sharded, "model.safetensors.index.json"), JSON.stringify(index));
  expect(digests(readAll(model, sharded))).toEqual(expected);
  expect(digests(readAll(model, join(sharded, "model.safetensors.index.json")))).toEqual(expected);

  truncateSync(join(sharded, "b.safetensors"), 5000);
  expect(complaint(() => checkpointFor(model, sharded))).toContain("b.safetensors");
});

test("dense, tied and head-normed models go to Hugging Face names and back; our own names are read too", () => {
  const small = { ...mixtral, moe: null, ffn: 24, hidden: 16, heads: 4, kv_heads: 2, head_dim: 6, vocab: 10 };
  for (const model of [small, { ...small, tie_embeddings: true, qk_norm: "head" as const }, { ...small, qk_norm: "full" as const }]) {
    const named = random(model);
    const path = join(folder, "dense.safetensors");
    writeSafetensors(path, toHuggingFace(model, named));
    expect(readAll(model, path)).toEqual(named);
    writeSafetensors(
      path,
      [...named].map(([name, value]) => ({ name, dtype: "F32", ...value })),
    );
    expect(readAll(model, path)).toEqual(named);
  }
  const names = toHuggingFace(small, random(small)).map(({ name }) => name);
  expect(names).toContain("model.layers.0.mlp.gate_proj.weight");
  expect(names).toContain("lm_head.weight");
});

/** Configs of every kind of layer, as small as they may be. */
const tiny = {
  ...{ hidden_size: 8, intermediate_size: 12, num_hidden_layers: 3, vocab_size: 10, num_attention_heads: 2, max_position_embeddings: 16 },
  ...{ num_experts: 4, n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 5 },
};
const lowRank = { kv_lora_rank: 6, qk_nope_head_dim: 3, qk_rope_head_dim: 2, v_head_dim: 5, n_group: 2, topk_group: 1 };
const kinds: Readonly<Record<string, object>> = {
  "Llama with biases": { model_type: "llama", attention_bias: true, num_key_value_heads: 1 },
  "Qwen2-MoE": { model_type: "qwen2_moe", num_key_value_heads: 1, shared_expert_intermediate_size: 7 },
  "Qwen3-MoE with dense layers": { model_type: "qwen3_moe", num_key_value_heads: 1, head_dim: 6, mlp_only_layers: [1] },
  "DeepSeek-V3": { model_type: "deepseek_v3", ...lowRank, q_lora_rank: 4, n_shared_experts: 2, first_k_dense_replace: 1 },
  "DeepSeek-V2 without a query latent": { model_type: "deepseek_v2", ...lowRank, q_lora_rank: null, first_k_dense_replace: 0 },
};

test.each(Object.entries(kinds))("%s: the same parameters from fused tensors, from one an expert, and from our own", (_, config) => {
  const model = imported({ ...tiny, ...config });
  const named = random(model);
  const path = join(folder, "kind.safetensors");
  const fused = toHuggingFace(model, named);
  const ours = [...named].map(([name, value]): TensorEntry => ({ name, dtype: "F32", ...value }));
  for (const all of [fused, perExpert(fused, hubOlmoe), ours]) {
    writeSafetensors(path, all);
    expect(readAll(model, path)).toEqual(named);
  }
});

test("the names are transformers'", () => {
  const names = (kind: string, layer: number) => {
    const model = imported({ ...tiny, ...kinds[kind] });
    const own = toHuggingFace(model, random(model)).filter(({ name }) => name.startsWith(`model.layers.${layer}.`));
    return own.map(({ name, shape }) => `${name.replace(/^model\.layers\.\d+\./, "")} ${shape.join("x")}`);
  };
  expect(names("DeepSeek-V3", 1)).toMatchInlineSnapshot(`
    [
      "input_layernorm.weight 8",
      "mlp.experts.down_proj 4x8x5",
      "mlp.experts.gate_up_proj 4x10x8",
      "mlp.gate.e_score_correction_bias 4",
      "mlp.gate.weight 4x8",
      "mlp.shared_experts.down_proj.weight 8x10",
      "mlp.shared_experts.gate_proj.weight 10x8",
      "mlp.shared_experts.up_proj.weight 10x8",
      "post_attention_layernorm.weight 8",
      "self_attn.kv_a_layernorm.weight 6",
      "self_attn.kv_a_proj_with_mqa.weight 8x8",
      "self_attn.kv_b_proj.weight 16x6",
      "self_attn.o_proj.weight 8x10",
      "self_attn.q_a_layernorm.weight 4",
      "self_attn.q_a_proj.weight 4x8",
      "self_attn.q_b_proj.weight 10x4",
    ]
  `);
  expect(names("DeepSeek-V3", 0).filter((name) => name.startsWith("mlp."))).toMatchInlineSnapshot(`
    [
      "mlp.down_proj.weight 8x12",
      "mlp.gate_proj.weight 12x8",
      "mlp.up_proj.weight 12x8",
    ]
  `);
  expect(names("Qwen2-MoE", 2)).toMatchInlineSnapshot(`
    [
      "input_layernorm.weight 8",
      "mlp.experts.down_proj 4x8x5",
      "mlp.experts.gate_up_proj 4x10x8",
      "mlp.gate.weight 4x8",
      "mlp.shared_expert.down_proj.weight 8x7",
      "mlp.shared_expert.gate_proj.weight 7x8",
      "mlp.shared_expert.up_proj.weight 7x8",
      "mlp.shared_expert_gate.weight 1x8",
      "post_attention_layernorm.weight 8",
      "self_attn.k_proj.bias 4",
      "self_attn.k_proj.weight 4x8",
      "self_attn.o_proj.weight 8x8",
      "self_attn.q_proj.bias 8",
      "self_attn.q_proj.weight 8x8",
      "self_attn.v_proj.bias 4",
      "self_attn.v_proj.weight 4x8",
    ]
  `);
});

test("layers of multi-token prediction that the job lacks are not read; surplus tensors of the job's own layers are refused", () => {
  const model = imported({ ...tiny, ...kinds["DeepSeek-V3"] });
  const path = join(folder, "more.safetensors");
  const further: TensorEntry = { name: "model.layers.3.eh_proj.weight", dtype: "F32", shape: [2], data: Float32Array.of(1, 2) };
  writeSafetensors(path, [...toHuggingFace(model, random(model)), further]);
  const open = checkpointFor(model, path);
  expect(open.unused).toEqual([further.name]);
  expect(open.notes).toEqual(["tensors of multi-token prediction layers that the job has not are not used: 1"]);
  open.close();
  const { moe } = model;
  const plain = { ...model, moe: { ...moe!, shared: null, router: { ...moe!.router, expert_bias: false } } };
  expect(complaint(() => checkpointFor(plain, path))).toMatchInlineSnapshot(`
    "DIR/more.safetensors: does not fit the job in 8 places
      model.layers.1.mlp.gate.e_score_correction_bias is there, and the job has no such part (check model.moe.router.expert_bias)
      model.layers.1.mlp.shared_experts.down_proj.weight is there, and the job has no such part (check model.moe.shared)
      model.layers.1.mlp.shared_experts.gate_proj.weight is there, and the job has no such part (check model.moe.shared)
      model.layers.1.mlp.shared_experts.up_proj.weight is there, and the job has no such part (check model.moe.shared)
      model.layers.2.mlp.gate.e_score_correction_bias is there, and the job has no such part (check model.moe.router.expert_bias)
      model.layers.2.mlp.shared_experts.down_proj.weight is there, and the job has no such part (check model.moe.shared)
      model.layers.2.mlp.shared_experts.gate_proj.weight is there, and the job has no such part (check model.moe.shared)
      model.layers.2.mlp.shared_experts.up_proj.weight is there, and the job has no such part (check model.moe.shared)"
  `);
  const llama = imported({ ...tiny, ...kinds["Llama with biases"] });
  writeSafetensors(path, toHuggingFace(llama, random(llama)));
  expect(complaint(() => checkpointFor({ ...llama, layers: 1, qkv_bias: false, out_bias: false }, path))).toMatchInlineSnapshot(`
    "DIR/more.safetensors: does not fit the job in 6 places
      model.layers.0.self_attn.k_proj.bias is there, and the job has no such part (check model.qkv_bias)
      model.layers.0.self_attn.o_proj.bias is there, and the job has no such part (check model.out_bias)
      model.layers.0.self_attn.q_proj.bias is there, and the job has no such part (check model.qkv_bias)
      model.layers.0.self_attn.v_proj.bias is there, and the job has no such part (check model.qkv_bias)
      model.layers.1 (13 tensors) is there, and the job has no such part (check model.layers)
      model.layers.2 (13 tensors) is there, and the job has no such part (check model.layers)"
  `);
  // and what it lacks
  expect(complaint(() => checkpointFor({ ...plain, layers: 1, moe: null }, path))).toMatchInlineSnapshot(`
    "DIR/more.safetensors: does not fit the job in 16 places
      model.layers.0.self_attn.q_a_proj.weight is missing; expected [4, 8] (check model.mla.q_rank)
      model.layers.0.self_attn.q_a_layernorm.weight is missing; expected [4] (check model.mla.q_rank)
      model.layers.0.self_attn.q_b_proj.weight is missing; expected [10, 4] (check model.mla.q_rank)
      model.layers.0.self_attn.kv_a_proj_with_mqa.weight is missing; expected [8, 8] (check model.mla)
      model.layers.0.self_attn.kv_a_layernorm.weight is missing; expected [6] (check model.mla)
      model.layers.0.self_attn.kv_b_proj.weight is missing; expected [16, 6] (check model.mla)
      model.layers.0.self_attn.o_proj.weight has shape [8, 8]; expected [8, 10] (model.heads x model.mla.v_dim = 10, here 8)
      model.layers.0.self_attn.k_proj.bias is there, and the job has no such part (check model.qkv_bias)
      model.layers.0.self_attn.k_proj.weight is there, and the job has no such part (check model.mla)
      model.layers.0.self_attn.o_proj.bias is there, and the job has no such part (check model.out_bias)
      and 6 more"
  `);
});

test("all mismatches of a checkpoint are reported together, with the job keys", () => {
  const file = `${fixture("mixtral-tiny")}/model.safetensors`;
  const say = (change: Partial<Model>): string => complaint(() => checkpointFor({ ...mixtral, ...change }, file));
  expect(say({ layers: 3 })).toMatchInlineSnapshot(`
    "test/fixtures/hf/mixtral-tiny/model.safetensors: does not fit the job in 9 places
      model.layers.2.input_layernorm.weight is missing; expected [64] (check model.layers)
      model.layers.2.self_attn.q_proj.weight is missing; expected [64, 64] (check model.layers)
      model.layers.2.self_attn.k_proj.weight is missing; expected [32, 64] (check model.layers)
      model.layers.2.self_attn.v_proj.weight is missing; expected [32, 64] (check model.layers)
      model.layers.2.self_attn.o_proj.weight is missing; expected [64, 64] (check model.layers)
      model.layers.2.post_attention_layernorm.weight is missing; expected [64] (check model.layers)
      model.layers.2.mlp.gate.weight is missing; expected [8, 64] (check model.layers)
      model.layers.2.mlp.experts.gate_up_proj is missing; expected [8, 192, 64] (check model.layers)
      model.layers.2.mlp.experts.down_proj is missing; expected [8, 64, 96] (check model.layers)"
  `);
  expect(say({ hidden: 32, head_dim: 16 })).toMatch(/and \d+ more$/);
  const moe = mixtral.moe!;
  expect(
    [say({ vocab: 300 }), say({ layers: 1, moe: { ...moe, experts: 4, ffn: 48 } }), say({ layers: 1, qk_norm: "head" })].join("\n"),
  ).toMatchInlineSnapshot(`
    "test/fixtures/hf/mixtral-tiny/model.safetensors: does not fit the job in 2 places
      model.embed_tokens.weight has shape [256, 64]; expected [300, 64] (model.vocab = 300, here 256)
      lm_head.weight has shape [256, 64]; expected [300, 64] (model.vocab = 300, here 256)
    test/fixtures/hf/mixtral-tiny/model.safetensors: does not fit the job in 4 places
      model.layers.0.mlp.gate.weight has shape [8, 64]; expected [4, 64] (model.moe.experts = 4, here 8)
      model.layers.0.mlp.experts.gate_up_proj has shape [8, 192, 64]; expected [4, 96, 64] (model.moe.experts = 4, here 8; 2 x model.moe.ffn = 96, here 192)
      model.layers.0.mlp.experts.down_proj has shape [8, 64, 96]; expected [4, 64, 48] (model.moe.experts = 4, here 8; model.moe.ffn = 48, here 96)
      model.layers.1 (9 tensors) is there, and the job has no such part (check model.layers)
    test/fixtures/hf/mixtral-tiny/model.safetensors: does not fit the job in 3 places
      model.layers.0.self_attn.q_norm.weight is missing; expected [16] (check model.qk_norm)
      model.layers.0.self_attn.k_norm.weight is missing; expected [16] (check model.qk_norm)
      model.layers.1 (9 tensors) is there, and the job has no such part (check model.layers)"
  `);
  expect(say({ moe: null })).toContain("mlp.gate_proj.weight is missing; expected [96, 64] (check model.moe)");
  const hub = join(folder, "mixtral-tiny.safetensors");
  expect(complaint(() => checkpointFor({ ...mixtral, moe: { ...moe, experts: 9 } }, hub))).toContain(
    "experts.8.w1.weight is missing; expected [96, 64] (check model.moe.experts)",
  );
  const fewer = checkpointFor({ ...mixtral, layers: 1 }, file, ["layers"]);
  expect(fewer.unused.length).toBe(9);
  expect(fewer.notes).toEqual(["allowed: model.layers.1 (9 tensors) is there, and the job has no such part (check model.layers)"]);
  expect(() => fewer.read("layers.0.wq", [64, 32])).toThrow("asked for [64, 32]");
  fewer.close();
});

/** A small dense model, its tensors under the names of transformers, and the error for a file of them after a change. */
const dense = { ...mixtral, moe: null, layers: 2, ffn: 24, hidden: 16, heads: 4, kv_heads: 2, head_dim: 6, vocab: 10 };
const tied = { ...dense, tie_embeddings: true };
const rename = (all: readonly TensorEntry[], change: (name: string) => string): TensorEntry[] =>
  all.map((entry) => ({ ...entry, name: change(entry.name) }));
const vector = (name: string, ...data: number[]): TensorEntry => ({
  name,
  dtype: "F32",
  shape: [data.length],
  data: Float32Array.from(data),
});
const hfDense = toHuggingFace(dense, random(dense));
const hfTied = toHuggingFace(tied, random(tied));
const embedding = hfTied.find(({ name }) => name === "model.embed_tokens.weight")!;
const head = { ...embedding, name: "lm_head.weight" };
const otherHead = { ...head, data: embedding.data.map((value) => value + 1) };

test.each<[string, Model, readonly TensorEntry[], readonly string[], RegExp]>([
  ["fewer layers", { ...dense, layers: 1 }, hfDense, ["model.layers"], /model\.layers\.1 \(9 tensors\) is there.*check model\.layers/],
  ["a bias of the head", dense, [...hfDense, vector("lm_head.bias", 1, 2)], ["lm_head.bias"], /lm_head\.bias is there/],
  [
    "a tied head that differs",
    tied,
    [...hfTied, otherHead],
    ["tie_embeddings"],
    /lm_head\.weight differs from model\.embed_tokens\.weight/,
  ],
  ["a vision tower", dense, [...hfDense, vector("vision.tower.w", 1)], ["vision"], /vision\.tower\.w is there/],
])("%s: refused, and accepted where the person allows it", (_, model, all, allowed, found) => {
  const path = join(folder, "surplus.safetensors");
  writeSafetensors(path, all);
  expect(complaint(() => checkpointFor(model, path))).toMatch(found);
  const open = checkpointFor(model, path, allowed);
  expect(open.notes.join()).toMatch(found);
  open.close();
});

test.each<[string, Model, readonly TensorEntry[]]>([
  ["a tied head that is the embedding again", tied, [...hfTied, head]],
  ["frequencies of positions", dense, [...hfDense, vector("model.layers.0.self_attn.rotary_emb.inv_freq", 1, 0.5)]],
])("%s: accepted without a message", (_, model, all) => {
  const path = join(folder, "same.safetensors");
  writeSafetensors(path, all);
  const open = checkpointFor(model, path);
  expect(open.notes).toEqual([]);
  open.close();
});

test.each<[string, (name: string) => string, string]>([
  ["of a base model", (name) => name.replace(/^model\./, ""), "named without the prefix model."],
  ["of a multimodal model", (name) => name.replace(/^model\./, "model.language_model."), "named model.language_model.…"],
  ["of an older multimodal model", (name) => `language_model.${name}`, "named language_model.model.…"],
  ["of another wrapper", (name) => `module.${name}`, "named module.model.… instead of model.…"],
])("names %s have a specific message", (_, change, found) => {
  const path = join(folder, "prefix.safetensors");
  writeSafetensors(path, rename(hfDense, change));
  expect(complaint(() => checkpointFor(dense, path))).toContain(found);
});

test("quantized weights with separate scales are refused", () => {
  const path = join(folder, "scaled.safetensors");
  const name = "model.layers.0.self_attn.o_proj.weight";
  const scale = (suffix: string): TensorEntry => ({ name: `${name}${suffix}`, dtype: "F32", shape: [1, 1], data: Float32Array.of(2) });
  for (const suffix of ["_scale_inv", "_scale"]) {
    writeSafetensors(path, [...hfDense, scale(suffix)]);
    const found = `DIR/scaled.safetensors: its weights are quantized: ${name} is F32 with scales in ${name}${suffix} [1,1]`;
    expect(complaint(() => checkpointFor(dense, path))).toBe(found);
  }
});

test("weights that are not finite are refused when they are read", () => {
  const path = join(folder, "nan.safetensors");
  const poisoned = hfDense.map((entry) =>
    entry.name === "model.norm.weight" ? { ...entry, data: entry.data.map(() => Number.NaN) } : entry,
  );
  writeSafetensors(path, poisoned);
  const open = checkpointFor(dense, path);
  expect(complaint(() => open.read("norm", [16]))).toBe(
    "DIR/nan.safetensors: model.norm.weight holds 16 of 16 values that are NaN or infinite",
  );
  open.close();
});

test("a wrong index is refused before a tensor is read", () => {
  const index = join(folder, "model.safetensors.index.json");
  const say = (text: string): string => {
    writeFileSync(index, text);
    return complaint(() => checkpointFor(mixtral, folder));
  };
  writeSafetensors(join(folder, "x.safetensors"), []);
  const [empty, saved] = [join(folder, "empty"), join(folder, "saved")];
  mkdirSync(empty);
  mkdirSync(join(saved, "step-00000004"), { recursive: true });
  expect(
    [
      say("{"),
      say("null"),
      say('{"weight_map": {"a": "../../x.safetensors"}}'),
      say('{"weight_map": {"a": "gone.safetensors"}}'),
      say('{"weight_map": {"a": "x.safetensors"}}'),
      complaint(() => checkpointFor(mixtral, empty)),
      complaint(() => checkpointFor(mixtral, saved)),
      complaint(() => checkpointFor(mixtral, join(folder, "gone.json"))),
    ].join("\n"),
  ).toMatchInlineSnapshot(`
    "DIR/model.safetensors.index.json: cannot be read as a checkpoint index (not JSON)
    DIR/model.safetensors.index.json: has no weight_map, which names the file of each tensor
    DIR/model.safetensors.index.json: tensor a is said to be in "../../x.safetensors", which is no safetensors file beside it
    DIR/gone.safetensors: the safetensors file does not exist
    DIR/x.safetensors: has no tensor a
    DIR/empty: holds neither model.safetensors.index.json nor model.safetensors
    DIR/saved is a checkpoint of a run, or a folder of them
    DIR/gone.json: cannot be read as a checkpoint index (ENOENT)"
  `);
});
