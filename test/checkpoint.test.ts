import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { checkpointFor, toHuggingFace } from "../runtime/checkpoint.ts";
import { type Entry, openSafetensors, writeSafetensors } from "../runtime/safetensors.ts";
import { completeJob, type Job, JobText } from "../schemas/job.ts";
import { Trouble } from "../schemas/trouble.ts";
import { importHf } from "../src/importHf.ts";

type Model = Job["model"];
type Named = Map<string, { shape: readonly number[]; data: Float32Array }>;

const folder = mkdtempSync(join(tmpdir(), "rankc-checkpoint-"));
afterAll(() => rmSync(folder, { recursive: true }));

const fixture = (name: string): string => `test/fixtures/hf/${name}`;
const modelOf = (name: string): Model =>
  completeJob(JobText.parse(importHf(JSON.parse(readFileSync(`${fixture(name)}/config.json`, "utf8")), name).job)).model;
const mixtral = modelOf("mixtral-tiny");
const olmoe = modelOf("olmoe-tiny");

/** Our parameters, written out by hand for the models of this test. */
function shapes(m: Model): [string, number[]][] {
  const [D, Q, K] = [m.hidden, m.heads * m.head_dim, m.kv_heads * m.head_dim];
  const norms = m.qk_norm === "none" ? [] : m.qk_norm === "full" ? [Q, K] : [m.head_dim, m.head_dim];
  const E = m.moe === null ? [] : [m.moe.experts];
  const F = m.moe === null ? m.ffn : m.moe.ffn;
  const layers = Array.from({ length: m.layers }, (_, i) => {
    const all: [string, number[]][] = [
      ["norm1", [D]],
      ["wq", [D, Q]],
      ["wk", [D, K]],
      ["wv", [D, K]],
      ["wo", [Q, D]],
      ...norms.map((size, j): [string, number[]] => [j === 0 ? "q_norm" : "k_norm", [size]]),
      ["norm2", [D]],
      ...(m.moe === null ? [] : [["router", [D, ...E]] as [string, number[]]]),
      ["w1", [...E, D, F]],
      ["w3", [...E, D, F]],
      ["w2", [...E, F, D]],
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
const entries = (file: string): Entry[] => {
  const open = openSafetensors(file);
  const all = open.names.map((name): Entry => ({ name, dtype: "F32", shape: open.info(name).shape, data: open.read(name) }));
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

test.each([
  ["mixtral-tiny", mixtral],
  ["olmoe-tiny", olmoe],
] as const)("%s: read as ours and written back, weights and gradients are the same tensors", (name, model) => {
  for (const file of ["model", "grads"]) {
    const path = `${fixture(name)}/${file}.safetensors`;
    const back = toHuggingFace(model, readAll(model, path));
    const byName = (all: readonly Entry[]) => digests(all.map((entry) => [entry.name, entry]));
    expect(byName(back)).toEqual(byName(entries(path).sort((a, b) => (a.name < b.name ? -1 : 1))));
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
function perExpert(file: string, names: { gate: string; up: string; down: string; router: string }): Entry[] {
  return entries(file).flatMap((entry) => {
    const [, layer, leaf] = /^(model\.layers\.\d+)\.mlp\.(.*)$/.exec(entry.name) ?? [];
    if (leaf === undefined) return [entry];
    if (leaf === "gate.weight") return [{ ...entry, name: `${layer}.${names.router}.weight` }];
    const [E, out, input] = entry.shape as [number, number, number];
    const parts = leaf === "experts.down_proj" ? [names.down] : [names.gate, names.up];
    const size = (out / parts.length) * input;
    return Array.from({ length: E }, (_, e) =>
      parts.map(
        (part, i): Entry => ({
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
  const parts = perExpert(`${fixture(name)}/model.safetensors`, names);
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

test("a checkpoint that does not fit says everything at once, with the job key to look at", () => {
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
    test/fixtures/hf/mixtral-tiny/model.safetensors: does not fit the job in 3 places
      model.layers.0.mlp.gate.weight has shape [8, 64]; expected [4, 64] (model.moe.experts = 4, here 8)
      model.layers.0.mlp.experts.gate_up_proj has shape [8, 192, 64]; expected [4, 96, 64] (model.moe.experts = 4, here 8; 2 x model.moe.ffn = 96, here 192)
      model.layers.0.mlp.experts.down_proj has shape [8, 64, 96]; expected [4, 64, 48] (model.moe.experts = 4, here 8; model.moe.ffn = 48, here 96)
    test/fixtures/hf/mixtral-tiny/model.safetensors: does not fit the job in 2 places
      model.layers.0.self_attn.q_norm.weight is missing; expected [16] (check model.qk_norm)
      model.layers.0.self_attn.k_norm.weight is missing; expected [16] (check model.qk_norm)"
  `);
  expect(say({ moe: null })).toContain("mlp.gate_proj.weight is missing; expected [96, 64] (check model.moe)");
  const hub = join(folder, "mixtral-tiny.safetensors");
  expect(complaint(() => checkpointFor({ ...mixtral, moe: { ...moe, experts: 9 } }, hub))).toContain(
    "experts.8.w1.weight is missing; expected [96, 64] (check model.moe.experts)",
  );
  const fewer = checkpointFor({ ...mixtral, layers: 1 }, file);
  expect(fewer.unused.length).toBe(9);
  expect(() => fewer.read("layers.0.wq", [64, 32])).toThrow("asked for [64, 32]");
  fewer.close();
});

test("an index that lies is refused before a tensor is read", () => {
  const index = join(folder, "model.safetensors.index.json");
  const say = (text: string): string => {
    writeFileSync(index, text);
    return complaint(() => checkpointFor(mixtral, folder));
  };
  writeSafetensors(join(folder, "x.safetensors"), []);
  const empty = join(folder, "empty");
  mkdirSync(empty);
  expect(
    [
      say("{"),
      say("null"),
      say('{"weight_map": {"a": "../../x.safetensors"}}'),
      say('{"weight_map": {"a": "gone.safetensors"}}'),
      say('{"weight_map": {"a": "x.safetensors"}}'),
      complaint(() => checkpointFor(mixtral, empty)),
      complaint(() => checkpointFor(mixtral, join(folder, "gone.json"))),
    ].join("\n"),
  ).toMatchInlineSnapshot(`
    "DIR/model.safetensors.index.json: cannot be read as a checkpoint index (not JSON)
    DIR/model.safetensors.index.json: has no weight_map, which names the file of each tensor
    DIR/model.safetensors.index.json: tensor a is said to be in "../../x.safetensors", which is no safetensors file beside it
    DIR/gone.safetensors: the safetensors file does not exist
    DIR/x.safetensors: has no tensor a
    DIR/empty: holds neither model.safetensors.index.json nor model.safetensors
    DIR/gone.json: cannot be read as a checkpoint index (ENOENT)"
  `);
});
