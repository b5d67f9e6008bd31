/** Checkpoints of Hugging Face that do not fit the job, are quantized, damaged or incomplete: all faults are named, with the keys. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { checkpointFor, toHuggingFace } from "../../runtime/checkpoint/hf.ts";
import { type TensorEntry, writeSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import {
  complaintsIn,
  entries,
  fixture,
  hubMixtral,
  imported,
  kinds,
  type Model,
  mixtral,
  perExpert,
  random,
  tiny,
} from "../support/hfModels.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-checkpoint-"));
afterAll(() => rmSync(folder, { recursive: true }));
const complaint = complaintsIn(folder);

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
  writeSafetensors(hub, perExpert(entries(file), hubMixtral));
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
