/**
 * Documents that share a sequence (data.documents): the inputs that the host computes from them, and that losses of a packed sequence are those of its
 * documents one by one.
 */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { documentsOf } from "../../runtime/data/documents.ts";
import { batchesFrom, type Reading } from "../../runtime/train/inputs.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import type { Job } from "../../schemas/job.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";
import { littleEndian } from "../support/labels.ts";
import { random } from "../support/opCases.ts";
import { slopeErrors } from "../support/slopes.ts";
import { byTier } from "../support/tiers.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-documents-"));
afterAll(() => rmSync(folder, { recursive: true }));

const END = 3;
const N = -100;
const reading: Reading = {
  ...{ seq: 8, batch: 1, vocab: 16, seed: 1, format: "tokens", dtype: "u16", order: "sequential", depths: 2 },
  ...{ weighed: true, weighting: { by: "microbatch", together: 8 }, documents: { end: END, loss: true } },
};
/** The batch of one sequence. */
const batchOf = (window: readonly number[], over: Partial<Reading> = {}) =>
  batchesFrom({ ...reading, ...over }, (_, into) => void into.set(window))(0, 1);
const numbers = (x: ArrayLike<number> | undefined) => Array.from(x ?? []);

describe("inputs that the host derives from documents", () => {
  test("a document begins after a token that ends one; a sequence begins in the midst of one", () => {
    expect(numbers(documentsOf(Int32Array.of(5, 6, END, 7, END, END, 8, 9), 8, { end: END, loss: true }).documents)).toEqual([
      0, 0, 0, 3, 3, 5, 6, 6,
    ]);
    expect(numbers(documentsOf(Int32Array.of(5, END, 7, END, 8, 9), 3, { end: END, loss: true }).documents)).toEqual([0, 0, 2, 0, 1, 1]);
  });

  test("no token is predicted from another document, at any depth", () => {
    const { documents, labels, labels_1, labels_2, weights } = batchOf([5, 6, END, 7, 8, 9, END, 10, 11]);
    expect(numbers(documents)).toEqual([0, 0, 0, 3, 3, 3, 3, 7]);
    expect(numbers(labels)).toEqual([6, END, N, 8, 9, END, N, 11]);
    expect(numbers(labels_1)).toEqual([END, N, N, 9, END, N, N, N]);
    expect(numbers(labels_2)).toEqual([N, N, N, END, N, N, N, N]);
    expect(numbers(weights)).toEqual([6, 6, 0, 6, 6, 6, 0, 6].map((n) => (n ? Math.fround(1 / n) : 0)));
  });

  test("with loss: false every token is predicted, as without documents", () => {
    const window = [5, 6, END, 7, 8, 9, END, 10, 11];
    const apart = batchOf(window, { documents: { end: END, loss: false } });
    const { documents, ...rest } = apart;
    expect(rest).toEqual(batchOf(window, { documents: undefined }));
    expect(documents).toBeDefined();
  });

  test("without a known end token the error names the key that sets it", () => {
    expect(() => batchOf([0, 1, 2, 3, 4, 5, 6, 7, 8], { documents: { end: null, loss: true } })).toThrow(
      "data.documents: no token is known",
    );
  });
});

const model = { layers: 2, hidden: 32, ffn: 48, heads: 4, kv_heads: 2, head_dim: 8, vocab: 256, seq: 32 };
const jobWith = (data: object, over: { model?: object; parallel?: object; train?: object } = {}): Job =>
  jobOf({
    name: "documents",
    model: { ...model, ...over.model },
    parallel: over.parallel ?? {},
    train: {
      ...{ micro_batch: 1, global_batch: 1, steps: 1, precision: "fp32", init_std: 0.2, optimizer: { lr: 1e-2, eps: 1e-6 } },
      ...over.train,
    },
    data: { path: "corpus.txt", ...data },
  });

/** Documents whose tokens, the end included, fill sequences of 32. */
const LENGTHS = [11, 5, 16, 2, 19, 11];
const next = random(7);
const texts = LENGTHS.map((length) => [...Array.from({ length: length - 1 }, () => 10 + Math.floor((next() + 1) * 100)), END]);

/** A file of ids that is long enough for a run. */
function idsFile(name: string, ids: readonly number[], rest: number): string {
  const path = join(folder, name);
  writeFileSync(path, littleEndian([...ids, ...new Array<number>(rest).fill(END)], "u16"));
  return path;
}
async function lossesOf(job: Job): Promise<{ loss: number; mtp: number; labels: number }> {
  const run = await openRun(compile(job).plan, { baseDir: fixture("") });
  const { loss, mtp_loss = 0, labels = 0 } = await run.step();
  await run.close();
  return { loss, mtp: mtp_loss, labels };
}

describe("losses of a packed sequence are those of its documents one by one", () => {
  const variants: Readonly<Record<string, object>> = {
    "grouped attention": {},
    "latent attention": { mla: { kv_rank: 12, nope_dim: 6, rope_dim: 4, v_dim: 5 }, head_dim: undefined, kv_heads: 4 },
    "experts and a further token": {
      moe: { experts: 4, top_k: 2, ffn: 16, router: { balance: "none" } },
      mtp: { layers: 1, coeff: 0.3 },
    },
    "a scaled rotary embedding": { rope: { scaling: { type: "yarn", factor: 4, original_seq: 8, beta_fast: 4 } } },
  };
  test.each(Object.entries(variants))("%s", async (name, over) => {
    const train = { global_batch: 2, loss_weighting: "token" };
    const packed = idsFile("packed.bin", texts.flat(), 80);
    const together = await lossesOf(jobWith({ path: packed, documents: { end: END } }, { model: over, train }));
    let [sum, further, count, furtherCount] = [0, 0, 0, 0];
    for (const [i, ids] of texts.entries()) {
      // a sequence of the document alone; what follows it has no labels, and no earlier token sees it
      const path = idsFile(`${i}.bin`, ids, 80);
      const marks = join(folder, `labels${i}.bin`);
      writeFileSync(
        marks,
        littleEndian(
          Array.from({ length: ids.length + 80 }, (_, t) => ids[t] ?? N),
          "i32",
        ),
      );
      const one = await lossesOf(jobWith({ path, labels: marks }, { model: over, train: { ...train, global_batch: 1 } }));
      const predicted = ids.length - 1;
      expect(one.labels).toBe(predicted);
      sum += one.loss * predicted;
      count += predicted;
      // the token after the next: one label less
      further += one.mtp * (predicted - 1);
      furtherCount += predicted - 1;
    }
    expect(together.labels).toBe(count);
    expect(Math.abs(together.loss - sum / count), name).toBeLessThan(2e-5);
    expect(together.mtp > 0).toBe("mtp" in over);
    expect(Math.abs(together.mtp - further / furtherCount), name).toBeLessThan(2e-5);
  });

  test("positions alone leave attention across borders, and the mask alone leaves positions: other losses than both", async () => {
    const path = idsFile("both.bin", texts.flat(), 80);
    const rotated = { rope: { theta: 50 } };
    const of = (documents?: object) => lossesOf(jobWith({ path, ...(documents && { documents }) }, { model: rotated }));
    const [none, mask, positions, both] = await Promise.all([
      of(),
      of({ end: END, positions: false, loss: false }),
      of({ end: END, mask: false, loss: false }),
      of({ end: END, loss: false }),
    ]);
    expect(Math.abs(mask.loss - none.loss)).toBeGreaterThan(1e-4);
    expect(Math.abs(positions.loss - none.loss)).toBeGreaterThan(1e-4);
    // a rotary embedding depends on distances alone: within a document they are the same
    expect(Math.abs(mask.loss - both.loss)).toBeLessThan(1e-5);
  });
});

describe("on any mesh, with recompute and dropout", () => {
  const path = idsFile("mesh.bin", [...texts.flat(), ...texts.flat(), ...texts.flat(), ...texts.flat()], 80);
  const over = { mtp: { layers: 1, coeff: 0.3 }, dropout: { attention: 0.2 } };
  const train = { global_batch: 4 };
  const want = lossesOf(jobWith({ path, documents: { end: END } }, { model: over, train }));
  const meshes: readonly (readonly [string, object, object])[] = [
    ["ring", { world: 4, context: 4, context_method: "ring" }, {}],
    ["all-gather of keys", { world: 2, context: 2, context_method: "all_gather" }, { recompute: { mode: "full" } }],
    ["pipeline", { world: 4, pipeline: 2, tensor: 2, sequence: true }, { recompute: { mode: "selective", modules: ["core_attn"] } }],
  ];
  for (const { options, rows } of byTier(meshes, ([name]) => name !== "pipeline"))
    test.each(rows)("%s", options, async (_, parallel, more) => {
      const got = await lossesOf(jobWith({ path, documents: { end: END } }, { model: over, parallel, train: { ...train, ...more } }));
      expect(got.labels).toBe((await want).labels);
      expect(Math.abs(got.loss - (await want).loss)).toBeLessThan(2e-5);
      expect(Math.abs(got.mtp - (await want).mtp)).toBeLessThan(2e-5);
    });
});

test("gradients are slopes of the loss within documents", async () => {
  const path = idsFile("slopes.bin", texts.flat(), 80);
  const job = jobWith({ path, documents: { end: END } }, { model: { layers: 1, seq: 16 }, train: { global_batch: 2 } });
  for (const [name, error] of await slopeErrors(job, ({ loss }) => loss)) expect(error, name).toBeLessThan(5e-3);
});

test("a plan without data.documents has no input for documents; one with `loss` alone has none either", async () => {
  const sources = (documents?: object) =>
    compile(jobWith(documents ? { documents } : {})).plan.programs.flatMap((p) => p.inputs.map(({ source }) => source));
  expect(sources()).not.toContain("documents");
  expect(sources({ end: END, mask: false, positions: false })).not.toContain("documents");
  expect(sources({ end: END, mask: false, positions: false })).toContain("weights");
  expect(sources({ end: END })).toContain("documents");
});
