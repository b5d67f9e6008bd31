/** Checkpoints in the layouts of Hugging Face: what is read is what was saved, under every name that transformers gives. */
import { mkdirSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { checkpointFor, toHuggingFace } from "../../runtime/checkpoint/hf.ts";
import { openSafetensors, type TensorEntry, writeSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import {
  complaintsIn,
  digests,
  entries,
  fixture,
  hubMixtral,
  hubOlmoe,
  imported,
  kinds,
  mixtral,
  modelOf,
  olmoe,
  perExpert,
  random,
  readAll,
  tiny,
} from "../support/hfModels.ts";
import { references } from "../support/referenceJobs.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-checkpoint-"));
afterAll(() => rmSync(folder, { recursive: true }));
const complaint = complaintsIn(folder);

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
