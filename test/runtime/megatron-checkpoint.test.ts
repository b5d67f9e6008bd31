/**
 * Checkpoints of Megatron Core: the weights of an import are those that were saved, however layers and chunks lie; pickles are data; and what
 * is damaged, missing or of another model is one message.
 */
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeEach, describe, expect, test } from "vitest";
import { distcpFolder, openDistcp } from "../../runtime/checkpoint/megatron/distcp.ts";
import { gptWeights } from "../../runtime/checkpoint/megatron/gptWeights.ts";
import { PickledObject, readPickle } from "../../runtime/checkpoint/megatron/pickle.ts";
import { argumentsIn } from "../../runtime/checkpoint/megatron/savedArguments.ts";
import { readTensor } from "../../runtime/checkpoint/megatron/torchFile.ts";
import { openSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { expectPlainStorage, wordsOfArguments } from "../../src/convert/megatron/checkpointArguments.ts";
import { importMegatron } from "../../src/convert/megatron/importMegatron.ts";
import { readQuickly } from "../../src/frontend/readJob.ts";
import { fixture, sameNumbers } from "../support/job.ts";
import { rankc } from "../support/rankc.ts";

const place = mkdtempSync(join(tmpdir(), "rankc-megatron-"));
afterAll(() => rmSync(place, { recursive: true, force: true }));
let folder: string;
let made = 0;
beforeEach(() => {
  folder = join(place, String(made++));
});
const fixtureOf = (name: string): string => fixture(`megatron-checkpoints/${name}`);
/** A copy of a fixture, to be damaged. */
function copyOf(name: string): string {
  cpSync(fixtureOf(name), folder, { recursive: true });
  return folder;
}
const trouble = (act: () => unknown): string => {
  try {
    act();
  } catch (error) {
    if (error instanceof Trouble) return error.message.replaceAll(place, "DIR").replaceAll(/DIR\/\d+/g, "DIR");
    throw error;
  }
  return "nothing";
};

test.each([
  ["mixtral", "mixtral", ["--vocab", "48"]],
  ["deepseek", "deepseek_v3", []],
  ["dense", "qwen3", []],
])("%s: an import has the weights that were saved, under the names of %s", async (name, family, options) => {
  const out = join(folder, "model");
  mkdirSync(folder);
  const printed = await rankc("import", "checkpoint", fixtureOf(name), "-o", out, "--dtype", "fp32", ...options);
  expect(printed.exit, printed.err).toBe(0);
  expect(printed.out).toContain(`model: ${family}, `);
  const [found, expected] = [
    openSafetensors(join(out, "model.safetensors")),
    openSafetensors(join(fixtureOf(name), "expected.safetensors")),
  ];
  expect([...found.names].sort()).toEqual([...expected.names].sort());
  for (const tensor of expected.names) {
    expect(found.info(tensor).shape, tensor).toEqual(expected.info(tensor).shape);
    expect(sameNumbers(found.read(tensor), expected.read(tensor)), tensor).toBe(true);
  }
  for (const each of [found, expected]) each.close();
});

/** The model of a fixture. */
function modelOf(name: string, changes: Readonly<Record<string, unknown>> = {}) {
  const dist = openDistcp(fixtureOf(name));
  const args = new Map<unknown, unknown>([...argumentsIn(dist), ...Object.entries(changes)]);
  dist.close();
  const words = [...wordsOfArguments(args), "--vocab-size", "48", "--make-vocab-size-divisible-by", "1"];
  const { job } = readQuickly(importMegatron({ kind: "words" }, { name, words, world: 1, vocab: 48 }).text, name, []);
  if (!job) throw new Error(name);
  return job.model;
}

describe("faults", () => {
  test("of the folder are reported before weights are read", () => {
    mkdirSync(folder);
    expect(trouble(() => distcpFolder(join(folder, "no")))).toBe("DIR/no is no folder");
    expect(trouble(() => distcpFolder(folder))).toBe("DIR has no .metadata: it is no checkpoint in the format torch_dist");
    mkdirSync(join(folder, "mp_rank_00"));
    expect(trouble(() => distcpFolder(folder))).toBe("DIR has Megatron's format torch (mp_rank_…), not torch_dist");
    cpSync(fixtureOf("dense"), join(folder, "iter_0000007"), { recursive: true });
    writeFileSync(join(folder, "latest_checkpointed_iteration.txt"), "7\n");
    expect(distcpFolder(folder)).toBe(join(folder, "iter_0000007"));
    writeFileSync(join(folder, "latest_checkpointed_iteration.txt"), "../7");
    expect(trouble(() => distcpFolder(folder))).toContain('holds "../7", which is no step');
  });

  test("with metadata.json: it is missing, damaged, or of another format", () => {
    const text = join(copyOf("dense"), "metadata.json");
    const printed = (content: string): string => {
      writeFileSync(text, content);
      return trouble(() => openDistcp(folder));
    };
    expect(printed("{")).toContain("metadata.json is not JSON: Megatron writes it last, so the checkpoint is unfinished");
    expect(printed('{"sharded_backend": "torch_dcp"}')).toBe('DIR has the format "torch_dcp"');
    rmSync(text);
    expect(trouble(() => openDistcp(folder))).toContain("metadata.json is missing");
  });

  test("with files: one is missing, cut, or changed", () => {
    copyOf("mixtral");
    const readAll = (): void => {
      const dist = openDistcp(folder);
      try {
        for (const [key, sizes] of dist.tensors)
          dist.read(
            key,
            sizes.map((n) => [[0, n]]),
          );
      } finally {
        dist.close();
      }
    };
    expect(trouble(readAll)).toBe("nothing");
    const [file, other] = readdirSync(folder).filter((name) => name.endsWith(".distcp"));
    const bytes = readFileSync(join(folder, file ?? ""));
    truncateSync(join(folder, file ?? ""), bytes.length - 10);
    expect(trouble(readAll)).toMatch(/should end at byte \d+, the file ends at \d+: it was cut/);
    // the signature of the first item
    writeFileSync(join(folder, file ?? ""), bytes.fill(0, 0, Math.floor(bytes.length / 2)));
    expect(trouble(readAll)).toMatch(/not an archive of torch.save, or a damaged one/);
    renameSync(join(folder, other ?? ""), join(folder, "gone"));
    expect(trouble(readAll)).not.toBe("nothing");
  });

  test("with .metadata: cut anywhere, it is one message", () => {
    const path = join(copyOf("deepseek"), ".metadata");
    const bytes = readFileSync(path);
    for (let length = 0; length < bytes.length; length += 1 + Math.floor(bytes.length / 150)) {
      writeFileSync(path, bytes.subarray(0, length));
      expect(
        trouble(() => openDistcp(folder)),
        `${length} bytes`,
      ).toContain(".metadata");
    }
    // a name of a file that leaves the folder
    writeFileSync(path, Buffer.from(bytes.toString("latin1").replaceAll("__0_0.distcp", "../00.distcp"), "latin1"));
    expect(trouble(() => openDistcp(folder))).toContain('names the file "../00.distcp", which is no .distcp file beside it');
  });

  test("with the model: parts that are missing, that are too many, or of another size", () => {
    const dist = openDistcp(fixtureOf("mixtral"));
    const fits = (changes: Record<string, unknown>): string => trouble(() => gptWeights(dist, modelOf("mixtral", changes)));
    expect(fits({})).toBe("nothing");
    expect(fits({ qk_layernorm: true })).toMatch(/does not fit the model in 4 places\n {2}no weights for layers\.0\.q_norm/);
    expect(fits({ untie_embeddings_and_output_weights: false })).toBe("nothing");
    expect(fits({ moe_ffn_hidden_size: 48 })).toMatch(
      /linear_fc1\.weight has shape \[2, 4, 48, 32\], which is not that of layers\.0\.w1, \[4, 32, 48\]/,
    );
    expect(fits({ num_query_groups: 4 })).toMatch(/linear_qkv\.weight has shape/);
    expect(fits({ num_experts: null, add_bias_linear: false })).toContain("mlp.router.weight is there, and the model has no such part");
    dist.close();
  });
});

test("arguments that change how weights are stored are refused", () => {
  for (const [field, value] of [
    ["apply_layernorm_1p", true],
    ["moe_mlp_glu_interleave_size", 32],
  ] as const)
    expect(trouble(() => expectPlainStorage(new Map<unknown, unknown>([[field, value]])))).toContain(`--${field.replaceAll("_", "-")}: `);
  expectPlainStorage(
    new Map<unknown, unknown>([
      ["apply_layernorm_1p", false],
      ["moe_mlp_glu_interleave_size", null],
    ]),
  );
  expect(() => modelOf("dense", { attention_output_gate: true })).toThrow("attention-output-gate");
});

describe("pickles", () => {
  const read = (...parts: (string | number[])[]): unknown =>
    readPickle(Buffer.concat(parts.map((part) => (typeof part === "string" ? Buffer.from(part, "latin1") : Buffer.from(part)))), "x");

  test("a call is a record: nothing is executed", () => {
    const made = read([0x80, 2], "cos\nsystem\n", [0x58, 2, 0, 0, 0], "ls", [0x85], "R.");
    expect(made).toBeInstanceOf(PickledObject);
    expect(made).toMatchObject({ type: "os.system", args: ["ls"] });
  });

  test("opcodes that checkpoints do not have are refused by number and place", () => {
    // INST, which older protocols use for calls
    expect(trouble(() => read([0x80, 2], "(ios\nsystem\n."))).toBe(
      "x: the pickle has opcode 0x69 at byte 3, which checkpoints do not have",
    );
    for (const part of ["", ".", "R.", "t.", "b.", "u.", "h\u0005.", "X\u00ff\u00ff\u00ff\u007f.", "(.", "K\u0001K\u0002R.", "]b."])
      expect(
        trouble(() => read([0x80, 2], part)),
        JSON.stringify(part),
      ).toMatch(/^x: the pickle has /);
  });

  test("integers of any size are read", () => {
    expect(read([0x80, 2, 0x8a, 1, 0xff], ".")).toBe(-1);
    expect(read([0x80, 2, 0x8a, 5, 0, 0, 0, 0, 1], ".")).toBe(2 ** 32);
    expect(read([0x80, 2, 0x8a, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1], ".")).toBe(2n ** 64n);
    expect(read([0x80, 2, 0x4a, 0xfe, 0xff, 0xff, 0xff], ".")).toBe(-2);
  });
});

test("an archive that is cut anywhere is one message", () => {
  const bytes = readFileSync(join(fixtureOf("dense"), "common.pt"));
  for (let length = 0; length < bytes.length; length += 13) {
    const read = (into: Uint8Array, at: number): void => void into.set(bytes.subarray(at, at + into.length));
    expect(
      trouble(() => readTensor({ where: "x", bytes: length, read })),
      `${length} bytes`,
    ).toMatch(/^x/);
  }
});
