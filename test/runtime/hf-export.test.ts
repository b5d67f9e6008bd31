/** Exports for Hugging Face: the config is that of the model, the tensors are those of the checkpoint, and a folder is whole or unchanged. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeEach, describe, expect, test } from "vitest";
import type { RankDevice } from "../../runtime/backend.ts";
import { openCheckpoint } from "../../runtime/checkpoint/checkpoint.ts";
import { BESIDE, PER_WRITER } from "../../runtime/checkpoint/exportMemory.ts";
import { openExportThreads } from "../../runtime/checkpoint/exportThread.ts";
import { checkpointFor } from "../../runtime/checkpoint/hf.ts";
import { type ExpertNames, exportedTensors } from "../../runtime/checkpoint/hfExport.ts";
import { writeHfFolder } from "../../runtime/checkpoint/hfFolder.ts";
import { modelDifferences } from "../../runtime/checkpoint/mismatch.ts";
import { openSafetensors, sha256 } from "../../runtime/checkpoint/safetensors.ts";
import { CheckpointSaver } from "../../runtime/checkpoint/saver.ts";
import { tokenizerFiles } from "../../runtime/checkpoint/tokenizerFiles.ts";
import { dtypes } from "../../schemas/dtypes.ts";
import { bf16Codec } from "../../schemas/floatCodec.ts";
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import type { Buffer } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { compile } from "../../src/compile.ts";
import { hfConfigsOf } from "../../src/convert/hf/exportConfig.ts";
import { importHf } from "../../src/convert/hf/importHf.ts";
import { jobOf } from "../support/job.ts";
import { rankc } from "../support/rankc.ts";
import { referenceJob, references } from "../support/referenceJobs.ts";

const place = mkdtempSync(join(tmpdir(), "rankc-export-"));
afterAll(() => rmSync(place, { recursive: true, force: true }));
let folder: string;
let made = 0;
beforeEach(() => {
  folder = join(place, String(made++));
});

const settings = { dtype: "bfloat16", initStd: 0.02, positions: 64 };
const familiesOf = (model: Job["model"]): string[] =>
  hfConfigsOf(model, settings).flatMap(({ family, config }) => {
    try {
      const { job } = importHf(config, "x", { mtp: model.mtp !== null && config.num_nextn_predict_layers !== undefined });
      return modelDifferences(completeJob(JobText.parse(job)).model, model).mismatches.length === 0 ? [family] : [];
    } catch {
      return [];
    }
  });

/** A checkpoint of pseudo-random weights, saved by all ranks of the job. */
async function checkpointOf(job: Job, at = join(folder, "checkpoints"), digestBytes?: number): Promise<string> {
  const { plan } = compile(job);
  let seed = 1;
  const next = (): number => {
    seed = (seed * 16807) % 2147483647;
    return seed / 2147483647 - 0.5;
  };
  const read = async ({ shape }: Buffer) => Float32Array.from({ length: elementsOf(shape) }, next);
  const localRanks = {
    ranks: Array.from({ length: plan.mesh.world }, (_, r) => r),
    rankDevice: () => ({ read }) as unknown as RankDevice,
  };
  const saver = new CheckpointSaver({ plan, folder: at, version: "test", localRanks, threads: 0, ...(digestBytes && { digestBytes }) });
  const { done } = await saver.begin({ steps: 7, read: 7, trained: 7, updates: 7, loss_scale: null });
  await saver.close();
  return (await done).folder;
}

test.each(references)("%s: a config of its own family describes the model", (name) => {
  const family = JSON.parse(readFileSync(new URL(`../fixtures/hf/${name}/config.json`, import.meta.url), "utf8")).model_type;
  expect(familiesOf(referenceJob(name).model)).toContain(family);
});

test("a model has the families that describe it, and no other", () => {
  const train = { global_batch: 2, steps: 4, precision: "fp32", optimizer: { lr: 1e-3 } };
  const small = { layers: 2, hidden: 32, heads: 4, vocab: 256, seq: 8 };
  const of = (model: object) => familiesOf(jobOf({ name: "x", model: { ...small, ...model }, train, data: { path: "corpus.txt" } }).model);
  expect(of({})).toContain("llama");
  expect(of({ qkv_bias: true })).toEqual(["qwen2"]);
  expect(of({ qk_norm: "head" })).toEqual(["qwen3"]);
  expect(of({ activation: "geglu" })).toEqual([]);
  const moe = { experts: 4, top_k: 2, ffn: 16 };
  expect(of({ moe: { ...moe, router: { normalize_top_k: true } } })).toContain("mixtral");
  expect(of({ qk_norm: "full", moe })).toEqual(["olmoe"]);
  expect(of({ moe: { ...moe, latent: 8 } })).toEqual([]);
});

describe("tensors", () => {
  const job = (): Job => referenceJob("qwen2-moe-tiny", { world: 4, expert: 2, tensor: 2, sequence: true, distributed_optimizer: true });
  const exported = async (
    experts: ExpertNames,
    dtype: "f32" | "bf16",
    shardBytes = 1e9,
  ): Promise<{ out: string; at: string; model: Job["model"] }> => {
    const at = await checkpointOf(job());
    const checkpoint = openCheckpoint(at);
    const model = checkpoint.model();
    const out = join(folder, "model");
    await writeHfFolder(out, exportedTensors(model, checkpoint, experts), {
      dtype,
      shardBytes,
      texts: { "config.json": "{}" },
      copies: {},
    });
    checkpoint.close();
    return { out, at, model };
  };

  test.each([
    ["mlp.experts", "f32", 40_000],
    ["block_sparse_moe", "f32", 1e9],
    ["fused", "f32", 1e9],
    ["mlp.experts", "bf16", 1e9],
  ] as const)(
    "%s in %s, in files of %d bytes, are the checkpoint's values when they are read again",
    async (experts, dtype, shardBytes) => {
      const { out, at, model } = await exported(experts, dtype, shardBytes);
      const [checkpoint, hf] = [openCheckpoint(at), checkpointFor(model, out)];
      for (const name of ["embed", "layers.0.w1", "layers.1.w2", "layers.1.shared.gate", "layers.1.router", "norm", "head"]) {
        const whole = checkpoint.whole(name);
        if (!whole) throw new Error(name);
        const codes = new Uint16Array(whole.data.length);
        const wanted = new Float32Array(whole.data.length);
        bf16Codec.encode(codes, whole.data);
        bf16Codec.decode(wanted, codes);
        expect(hf.read(name, whole.shape), name).toEqual(dtype === "bf16" ? wanted : whole.data);
      }
      expect(hf.unused).toEqual([]);
      for (const each of [checkpoint, hf]) each.close();
      const files = readdirSync(out).filter((file) => file.endsWith(".safetensors"));
      for (const file of files) {
        const opened = openSafetensors(join(out, file));
        opened.close();
        expect(opened.metadata).toEqual({ format: "pt" });
        const bytes = opened.names.reduce((sum, name) => sum + opened.info(name).bytes, 0);
        // a larger tensor is alone
        if (opened.names.length > 1) expect(bytes).toBeLessThanOrEqual(shardBytes);
      }
      if (files.length === 1) return;
      const index = JSON.parse(readFileSync(join(out, "model.safetensors.index.json"), "utf8"));
      expect(files[0]).toBe(`model-00001-of-${String(files.length).padStart(5, "0")}.safetensors`);
      expect(new Set(Object.values(index.weight_map))).toEqual(new Set(files));
      expect(index.metadata.total_size).toBe(
        4 * Object.keys(index.weight_map).reduce((sum, name) => sum + elementsOf(shapeIn(out, index, name)), 0),
      );
    },
  );

  const shapeIn = (out: string, { weight_map }: { weight_map: Record<string, string> }, name: string): readonly number[] => {
    const file = openSafetensors(join(out, weight_map[name] ?? ""));
    file.close();
    return file.info(name).shape;
  };

  test("per expert have the names of published models", async () => {
    const names = (experts: ExpertNames) => {
      const checkpoint = openCheckpoint(at);
      const found = exportedTensors(checkpoint.model(), checkpoint, experts).map(({ name }) => name);
      checkpoint.close();
      return found.filter((name) => name.startsWith("model.layers.0.") && /expert|gate|moe/.test(name)).sort();
    };
    const at = await checkpointOf(referenceJob("mixtral-tiny"));
    expect(names("block_sparse_moe")).toContain("model.layers.0.block_sparse_moe.experts.1.w3.weight");
    expect(names("block_sparse_moe")).toContain("model.layers.0.block_sparse_moe.gate.weight");
    expect(names("mlp.experts")).toContain("model.layers.0.mlp.experts.1.up_proj.weight");
    expect(names("fused")).toEqual([
      "model.layers.0.mlp.experts.down_proj",
      "model.layers.0.mlp.experts.gate_up_proj",
      "model.layers.0.mlp.gate.weight",
    ]);
  });

  test.each([{}, { world: 4, tensor: 2, sequence: true, expert: 4 }, { world: 2, tensor: 2, sequence: true, expert_tensor: 2 }])(
    "of any size of parts and digests have the same values: %j",
    async (parallel) => {
      const job = jobOf({
        name: "export",
        model: {
          layers: 1,
          hidden: 32,
          heads: 4,
          vocab: 260,
          vocab_multiple: 16,
          seq: 8,
          moe: { experts: 4, top_k: 2, ffn: 16, router: { balance: "none" } },
        },
        parallel,
        train: { micro_batch: 1, global_batch: 4, steps: 1, precision: "fp32", optimizer: { lr: 1e-3 } },
        data: { path: "corpus.txt" },
      });
      const valuesOf = (at: string, experts: ExpertNames, partElements: number) => {
        const checkpoint = openCheckpoint(at);
        const tensors = exportedTensors(checkpoint.model(), checkpoint, experts, partElements);
        const values = tensors.map(({ name, shape, parts }) => {
          const all = new Float32Array(elementsOf(shape)).fill(Number.NaN);
          for (const { at, values, columns } of parts())
            if (!columns) all.set(values, at);
            else
              for (const [i, value] of values.entries())
                all[at + (i % columns.rows) * columns.cols + columns.first + Math.floor(i / columns.rows)] = value;
          return [name, [...all]] as const;
        });
        checkpoint.close();
        return {
          values,
          held: tensors.map(({ heldElements }) => heldElements),
          matrices: tensors.map(({ matrixElements }) => matrixElements),
        };
      };
      const [whole, inParts] = [await checkpointOf(job), await checkpointOf(job, join(folder, "parts"), 64)];
      for (const experts of ["fused", "mlp.experts"] as const) {
        const wanted = valuesOf(whole, experts, 2 ** 21).values;
        expect(wanted.flatMap(([, values]) => values.filter(Number.isNaN))).toEqual([]);
        for (const partElements of [1, 100])
          for (const at of [whole, inParts]) expect(valuesOf(at, experts, partElements).values).toEqual(wanted);
      }
      // parts are a row of the head at most; the head is the largest matrix that is transposed
      const { held, matrices } = valuesOf(inParts, "mlp.experts", 100);
      expect(Math.max(...(held as number[]))).toBe(260);
      expect(Math.max(...(matrices as number[]))).toBe(32 * 260);
    },
  );

  test("each file tensor of the checkpoint is read once", async () => {
    const checkpoint = openCheckpoint(await checkpointOf(job()));
    const reads = new Map<string, number>();
    const slices = (name: string) => {
      reads.set(name, (reads.get(name) ?? 0) + 1);
      return checkpoint.slices(name);
    };
    const counting = { ...checkpoint, slices };
    for (const tensor of exportedTensors(checkpoint.model(), counting, "mlp.experts")) for (const _ of tensor.parts());
    checkpoint.close();
    expect(new Set(reads.values())).toEqual(new Set([1]));
  });
});

test("threads write the same files, and their errors are those of one thread", async () => {
  const job = jobOf({
    name: "export",
    model: { layers: 2, hidden: 32, heads: 4, vocab: 256, seq: 8, moe: { experts: 4, top_k: 2, ffn: 16, router: { balance: "none" } } },
    parallel: { world: 1 },
    train: { micro_batch: 1, global_batch: 1, steps: 1, precision: "fp32", optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });
  const at = await checkpointOf(job);
  const checkpoint = openCheckpoint(at);
  const model = checkpoint.model();
  const tensors = exportedTensors(model, checkpoint, "mlp.experts");
  const how = { dtype: "bf16", shardBytes: 20_000, texts: { "config.json": "{}" }, copies: {} } as const;
  const out = [join(folder, "one"), join(folder, "two")] as const;
  const progress: number[] = [];
  await writeHfFolder(out[0], tensors, how);
  const writers = openExportThreads({ checkpoint: at, model, experts: "mlp.experts", dtype: "bf16" }, 1e9);
  if (!writers) throw new Error("no threads");
  await writeHfFolder(out[1], tensors, { ...how, writers, onTensor: (bytes) => progress.push(bytes) });
  const files = readdirSync(out[0]).sort();
  expect(files.length).toBeGreaterThan(3);
  expect(readdirSync(out[1]).sort()).toEqual(files);
  for (const file of files) expect(readFileSync(join(out[1], file)).equals(readFileSync(join(out[0], file))), file).toBe(true);
  expect(progress).toEqual([...progress].sort((a, b) => a - b));
  const path = join(at, "rank-00000.safetensors");
  const all = readFileSync(path);
  all[all.length - 1]! ^= 1;
  for (const byte of [all.length / 4, all.length / 8].map(Math.floor)) all[byte]! ^= 1;
  writeFileSync(path, all);
  await expect(writeHfFolder(out[1], tensors, { ...how, writers })).rejects.toThrow(/the SHA-256 of tensor .* differs/);
  expect(readdirSync(out[1]).sort()).toEqual(files);
  await writers.close();
  checkpoint.close();
});

test("memory is the largest matrix in the type of the file and a constant for each writer, for any number of them", async () => {
  const job = jobOf({
    name: "export",
    model: { layers: 2, hidden: 256, heads: 4, vocab: 32000, seq: 8, moe: { experts: 4, top_k: 2, ffn: 2048 } },
    parallel: { world: 1 },
    train: { micro_batch: 1, global_batch: 1, steps: 1, precision: "fp32", optimizer: { type: "sgd", lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });
  const at = await checkpointOf(job, undefined, 2 ** 20);
  const checkpoint = openCheckpoint(at);
  const model = checkpoint.model();
  const tensors = exportedTensors(model, checkpoint, "mlp.experts");
  const largest = Math.max(...tensors.map(({ shape }) => elementsOf(shape)));
  expect(largest).toBe(256 * 32000);
  const digests: string[] = [];
  for (const dtype of ["bf16", "f32"] as const)
    for (const threads of [1, 2, 3, 5]) {
      const writers = openExportThreads({ checkpoint: at, model, experts: "mlp.experts", dtype }, 1e12, threads);
      expect(writers?.count ?? 1).toBe(threads);
      const peaks: number[] = [];
      const out = join(folder, `${dtype}-${threads}`);
      const how = { dtype, shardBytes: 1e9, texts: {}, copies: {}, ...(writers && { writers }) };
      await writeHfFolder(out, tensors, { ...how, onMemory: (bytes) => peaks.push(bytes) });
      await writers?.close();
      const [peak = Number.NaN] = peaks;
      const bytes = largest * dtypes[dtype].bytes;
      // the head is collected whole, and read in parts
      expect(peak).toBeGreaterThanOrEqual(bytes + 2 ** 22);
      expect(peak).toBeLessThanOrEqual(bytes + BESIDE + threads * PER_WRITER);
      digests.push(`${dtype} ${sha256(readFileSync(join(out, "model.safetensors")))}`);
      rmSync(out, { recursive: true });
    }
  expect(new Set(digests).size).toBe(2);
  checkpoint.close();
});

test("a folder that holds something else is refused; a failed export leaves the model that was there", async () => {
  const tensors = (read: () => Float32Array) => [{ name: "a", shape: [2], isExact: false, parts: () => [{ at: 0, values: read() }] }];
  const how = { dtype: "f32", shardBytes: 1e9, texts: { "config.json": "1" }, copies: {} } as const;
  mkdirSync(folder);
  writeFileSync(join(folder, "notes.txt"), "");
  await expect(
    writeHfFolder(
      folder,
      tensors(() => new Float32Array(2)),
      how,
    ),
  ).rejects.toThrow("is not empty, and holds no model");
  const out = join(folder, "model");
  await writeHfFolder(
    out,
    tensors(() => Float32Array.of(1, 2)),
    how,
  );
  const fails = (): never => {
    throw Object.assign(new Error("no"), { code: "ENOSPC" });
  };
  await expect(writeHfFolder(out, tensors(fails), { ...how, texts: { "config.json": "2" } })).rejects.toMatchObject({
    message: expect.stringContaining("the disk is full (ENOSPC)"),
  });
  await expect(
    writeHfFolder(
      out,
      tensors(() => Float32Array.of(1, 7e4)),
      { ...how, dtype: "f16" },
    ),
  ).rejects.toThrow("fp16 cannot represent");
  expect(readFileSync(join(out, "config.json"), "utf8")).toBe("1");
  await writeHfFolder(
    out,
    tensors(() => Float32Array.of(3, 4)),
    { ...how, texts: { "config.json": "3" } },
  );
  expect(readdirSync(folder).sort()).toEqual(["model", "notes.txt"]);
  expect(readFileSync(join(out, "config.json"), "utf8")).toBe("3");
});

test("the files of a tokenizer are found beside it; without its config it gets one", () => {
  mkdirSync(folder);
  expect(tokenizerFiles(join(folder, "tokenizer.json"))).toBeUndefined();
  writeFileSync(join(folder, "tokenizer.json"), JSON.stringify({ added_tokens: [{ id: 5, content: "</s>" }] }));
  expect(tokenizerFiles(join(folder, "tokenizer.json"))).toMatchObject({
    copies: { "tokenizer.json": join(folder, "tokenizer.json") },
    texts: { "tokenizer_config.json": expect.stringContaining("PreTrainedTokenizerFast") },
  });
  writeFileSync(join(folder, "tokenizer_config.json"), JSON.stringify({ eos_token: { content: "</s>" }, bos_token: "<s>" }));
  expect(tokenizerFiles(folder)).toMatchObject({ texts: {}, ids: { eos_token_id: 5 } });
});

test("the command line exports a folder or every checkpoint, or reports the reason why not", async () => {
  const at = await checkpointOf(referenceJob("mixtral-tiny"));
  const out = join(folder, "model");
  const first = await rankc("export", "hf", at, "-o", out);
  expect(first.err).toBe("");
  expect(first.out).toMatch(/model: mixtral, \d+ tensors of .*step-00000007, after step 7/);
  expect(readdirSync(out).sort()).toEqual(["config.json", "generation_config.json", "model.safetensors"]);
  const config = JSON.parse(readFileSync(join(out, "config.json"), "utf8"));
  expect(config).toMatchObject({ architectures: ["MixtralForCausalLM"], model_type: "mixtral", torch_dtype: "bfloat16" });
  const imported = await rankc("import", "hf", out);
  expect(imported.exit, imported.err).toBe(0);
  const every = await rankc("export", "hf", join(folder, "checkpoints"), "-o", join(folder, "all"), "--every");
  expect(every.exit, every.err).toBe(0);
  expect(readdirSync(join(folder, "all"))).toEqual(["step-00000007"]);
  const wrong = await rankc("export", "hf", at, "-o", out, "--family", "olmoe");
  expect(wrong.exit).toBe(2);
  expect(wrong.err).toMatch(
    /no olmoe config of Hugging Face describes this model; the closest is olmoe:\n {2}model\.qk_norm is "full" in olmoe, "none" in the job/,
  );
  expect((await rankc("export", "hf", at, "-o", out, "--family", "mistral")).err).toContain("the choices are llama, qwen2,");
  expect((await rankc("export", "hf", at, "-o", out, "--tokenizer", join(folder, "nowhere"))).err).toContain(
    "holds no files of a tokenizer",
  );
});
