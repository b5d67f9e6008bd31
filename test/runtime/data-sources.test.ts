/** data.sources: samples cover every token of an epoch once, blends keep their weights, and a batch depends on its position alone. */
import { existsSync, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { blendOf } from "../../runtime/data/blend.ts";
import { openCorpus } from "../../runtime/data/corpus.ts";
import { gptSamples, splitBounds } from "../../runtime/data/gptDataset.ts";
import { openSources } from "../../runtime/data/sources.ts";
import { openTokenizer } from "../../runtime/data/tokenizers/openTokenizer.ts";
import type { Reading } from "../../runtime/train/inputs.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";
import { littleEndian } from "../support/labels.ts";
import { megatronIndex } from "../support/megatronIndex.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-sources-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** Writes a data set whose ids count from `first`, so that an id is its place. */
function dataset(name: string, lengths: readonly number[], first: number): string {
  const total = lengths.reduce((sum, length) => sum + length, 0);
  const ids = Array.from({ length: total }, (_, i) => first + i);
  writeFileSync(join(folder, `${name}.bin`), littleEndian(ids, "u16"));
  writeFileSync(join(folder, `${name}.idx`), megatronIndex(8, 2, lengths));
  return join(folder, name);
}
const reading: Reading = {
  ...{ seq: 7, batch: 4, vocab: 60_000, order: "sequential", seed: 3, format: "tokens", dtype: "u16" },
  ...{ weighed: false, weighting: { by: "microbatch", together: 7 }, depths: 0 },
};

test("each epoch uses every token of every document once, in an order of its own; neighbours share one token", () => {
  const lengths = Int32Array.of(5, 0, 11, 1, 23, 2, 9, 4, 0, 30);
  const total = lengths.reduce((sum, length) => sum + length, 0);
  const starts = [...lengths].map((_, i) => lengths.slice(0, i).reduce((sum, length) => sum + length, 0));
  for (const seq of [1, 3, 7, 17, 84]) {
    const sample = gptSamples({ lengths, seq, seed: 1, name: "x" });
    const epochs = 8;
    const count = Math.ceil((epochs * total) / seq);
    const samples = Array.from({ length: count }, (_, n) =>
      sample(n).flatMap(({ document, from, count }) => Array.from({ length: count }, (_, i) => (starts[document] ?? 0) + from + i)),
    );
    expect(samples.every(({ length }) => length === seq + 1)).toBe(true);
    // an independent reading: inputs of all samples are the tokens of all epochs, each as often as there are epochs
    const uses = new Map<number, number>();
    for (const id of samples.flatMap((ids) => ids.slice(0, -1))) uses.set(id, (uses.get(id) ?? 0) + 1);
    expect(uses.size).toBe(total);
    const spare = count * seq - epochs * total;
    expect([...uses.values()].filter((n) => n !== epochs).length).toBeLessThanOrEqual(spare);
    expect(Math.min(...uses.values())).toBe(epochs);
    // a document is read in its order: within it, ids follow each other
    const ends = new Set(starts.flatMap((start, i) => (lengths[i] ? [start + (lengths[i] ?? 0) - 1] : [])));
    for (const ids of samples) for (const [i, id] of ids.slice(0, -1).entries()) if (!ends.has(id)) expect(ids[i + 1]).toBe(id + 1);
  }
  const firsts = (seed: number, from: number): string =>
    Array.from({ length: 12 }, (_, n) => gptSamples({ lengths, seq: 7, seed, name: "x" })(from + n)[0])
      .map((piece) => `${piece?.document}.${piece?.from}`)
      .join(" ");
  expect(firsts(1, 0)).not.toBe(firsts(2, 0));
  expect(firsts(1, 0)).not.toBe(firsts(1, 12));
  const walk = gptSamples({ lengths, seq: 7, seed: 1, name: "x" });
  const late = walk(500);
  walk(2);
  expect(walk(500)).toEqual(late);
});

test("a blend takes samples by weight, each source in its order, as the plain form of Megatron's rule does", () => {
  const weights = [0.7, 0.2, 0.1, 2];
  const sum = weights.reduce((all, weight) => all + weight, 0);
  const blend = blendOf(weights);
  const count = 40_000;
  const used = weights.map(() => 0);
  for (let s = 0; s < count; s++) {
    const behind = weights.map((weight, k) => (weight / sum) * Math.max(s, 1) - (used[k] ?? 0));
    const source = behind.indexOf(Math.max(...behind));
    if (s % 97 === 0 || s > count - 100) expect(blend(s), String(s)).toEqual({ source, index: used[source] });
    used[source] = (used[source] ?? 0) + 1;
    for (const [k, n] of used.entries()) expect(Math.abs(n - ((weights[k] ?? 0) / sum) * (s + 1))).toBeLessThan(weights.length);
  }
  const again = blendOf(weights);
  expect([again(39_999), again(5), again(20_000)]).toEqual([blend(39_999), blend(5), blend(20_000)]);
});

test("a batch depends on the number of sequences before it: other sizes and a late start give the same rows", () => {
  const sources = [
    { path: dataset("a", [10, 3, 50, 1, 8], 0), weight: 3 },
    { path: `${dataset("b", [20, 20, 7], 1000)}.bin`, weight: 1 },
  ];
  const opened = openSources(sources, undefined, reading);
  const rows = (batches: readonly { ids: Int32Array; labels: Int32Array }[]): string[] =>
    batches.flatMap(({ ids, labels }) =>
      Array.from({ length: ids.length / 7 }, (_, r) => `${ids.slice(7 * r, 7 * r + 7)} > ${labels.slice(7 * r, 7 * r + 7)}`),
    );
  const fours = rows(Array.from({ length: 60 }, (_, step) => opened.batch(4 * step, 4)));
  expect(rows(Array.from({ length: 20 }, (_, step) => openSources(sources, undefined, reading).batch(12 * step, 12)))).toEqual(fours);
  expect(rows([openSources(sources, undefined, reading).batch(236, 4)])).toEqual(fours.slice(236));
  const ofB = fours.filter((row) => Number(row.split(",")[0]) >= 1000).length;
  expect(ofB).toBe(60);
  // labels are the next tokens
  for (const row of fours) expect(row.split(" > ")[1]?.split(",").slice(0, -1)).toEqual(row.split(" > ")[0]?.split(",").slice(1));
  opened.close();
});

test.skipIf(!existsSync("/proc/self/fd"))("an open source keeps one file open, and a closed one none", () => {
  const path = dataset("held", [10, 3, 50], 0);
  const held = (): number => readdirSync("/proc/self/fd").filter((fd) => linkOf(fd).startsWith(path)).length;
  const { close } = openSources(
    Array.from({ length: 5 }, () => ({ path, weight: 1 })),
    undefined,
    reading,
  );
  expect(held()).toBe(5);
  close();
  expect(held()).toBe(0);
});

/** The path of an open file; empty if it was closed meanwhile. */
function linkOf(fd: string): string {
  try {
    return readlinkSync(`/proc/self/fd/${fd}`);
  } catch {
    return "";
  }
}

test("training takes the documents of its share of a split, by Megatron's rounding", () => {
  expect(splitBounds([99990, 8, 2], 100_000)).toEqual([0, 99_990, 99_998, 100_000]);
  expect(splitBounds([1, 1], 5)).toEqual([0, 2, 5]);
  expect(splitBounds([1, 1], 7)).toEqual([0, 4, 7]);
  const path = dataset("split", [20, 20, 20, 20], 0);
  const opened = openSources([{ path, weight: 1 }], [3, 1], reading);
  const seen = new Set(Array.from({ length: 50 }, (_, step) => [...opened.batch(4 * step, 4).ids]).flat());
  expect([...seen].sort((a, b) => a - b)).toEqual(Array.from({ length: 60 }, (_, i) => i));
  opened.close();
});

test("a source that is missing, short, or has ids beyond the vocabulary is an error that names it", () => {
  const path = dataset("c", [10, 3], 100);
  const message = (source: string, changed: Partial<Reading> = {}, split?: readonly number[]): string => {
    try {
      openSources([{ path: source, weight: 1 }], split, { ...reading, ...changed }).batch(0, 4);
    } catch (error) {
      return error instanceof Trouble ? `${error.message} | ${error.fix}`.replaceAll(folder, "DIR") : String(error);
    }
    return "nothing";
  };
  expect(
    [message(join(folder, "no")), message(path, { seq: 13 }), message(path, { seq: 10 }, [1, 1]), message(path, { vocab: 105 })].join("\n"),
  ).toMatchInlineSnapshot(`
    "DIR/no.idx: the index of data.sources[0] does not exist | name the prefix of a data set with .bin and .idx, relative to the job or to --data-dir; rankc data prepare writes one
    DIR/c: the training part of data.sources[0] has 13 tokens in 2 documents; a sample needs 14 | use a longer source, lower model.seq, or give training a larger share in data.split
    DIR/c: the training part of data.sources[0] has 10 tokens in 1 documents; a sample needs 11 | use a longer source, lower model.seq, or give training a larger share in data.split
    DIR/c.bin: token 5 of the corpus is 105, outside a vocabulary of 105 | see that model.vocab is that of its tokenizer; ids are read as u16, the type in its index"
  `);
});

test("a text with a tokenizer trains on the ids that the tokenizer gives", () => {
  const path = join(folder, "text.txt");
  writeFileSync(path, "The quick brown fox jumps over the lazy dog. ".repeat(20));
  const tokenizer = fixture("tokenizers/llama3.json");
  const ids: number[] = [];
  openTokenizer(tokenizer).encode(readFileSync(path, "utf8"), ids);
  const text: Reading = { ...reading, format: "text", vocab: 700 };
  const { batch, close } = openCorpus({ path, tokenizer }, text);
  expect([...batch(0, 4).ids]).toEqual(ids.slice(0, 28));
  expect([...batch(0, 4).labels]).toEqual(ids.slice(1, 29));
  close();
  expect(() => openCorpus({ path, tokenizer }, { ...text, vocab: 699 })).toThrow("the tokenizer has 700 ids, and model.vocab is 699");
});

test("a data set that was prepared for a larger vocabulary than the model's is refused before the first batch", () => {
  const path = dataset("described", [40], 0);
  const described = { tokenizer: "t", tokenizer_sha256: "", kind: "BPE", vocab: 70_000, end_of_document: 0, dtype: "u16", documents: 1 };
  writeFileSync(`${path}.json`, JSON.stringify({ ...described, empty_documents: 0, tokens: 40, text_bytes: 1, inputs: [] }));
  expect(() => openSources([{ path, weight: 1 }], undefined, reading)).toThrow("was prepared with 70000 ids, and model.vocab is 60000");
});

test("a resumed run reads exactly the remaining samples, also on another mesh", async () => {
  dataset("run-a", [50, 3, 80, 40], 0);
  dataset("run-b", [30, 30, 30], 200);
  const job = (world: number) =>
    jobOf({
      name: "sources",
      model: { layers: 1, hidden: 16, heads: 2, vocab: 512, seq: 8 },
      parallel: { world },
      train: { global_batch: 4, steps: 6, precision: "fp32", optimizer: { lr: 1e-2 } },
      data: { sources: [{ path: "run-a", weight: 2 }, { path: "run-b" }], split: [9, 1] },
    });
  const losses = async (world: number, steps: number, settings: { save?: string; resume?: string }): Promise<number[]> => {
    const run = await openRun(compile(job(world)).plan, { baseDir: folder, ...settings });
    const all: number[] = [];
    while (all.length < steps) all.push((await run.step()).loss);
    if (settings.save) await run.save();
    await run.close();
    return all;
  };
  const whole = await losses(1, 6, {});
  const first = await losses(1, 3, { save: join(folder, "saved") });
  expect(first).toEqual(whole.slice(0, 3));
  expect(await losses(1, 3, { resume: join(folder, "saved") })).toEqual(whole.slice(3));
  const other = await losses(2, 3, { resume: join(folder, "saved") });
  for (const [i, loss] of other.entries()) expect(loss).toBeCloseTo(whole[3 + i] ?? 0, 4);
  expect(new Set(whole.map((loss) => loss.toFixed(3))).size).toBe(6);
});
