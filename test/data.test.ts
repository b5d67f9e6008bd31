import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import type { Reading } from "../runtime/batches.ts";
import { openCorpus } from "../runtime/data.ts";
import { openSafetensors } from "../runtime/safetensors.ts";
import { Trouble } from "../schemas/trouble.ts";

const corpus = "test/fixtures/corpus.txt";
const bytes = readFileSync(corpus);
const reading: Reading = { seq: 64, batch: 4, vocab: 256, order: "sequential", seed: 1 };
const folder = mkdtempSync(join(tmpdir(), "rankc-data-"));
afterAll(() => rmSync(folder, { recursive: true }));

test("the first batch is the one the reference run saw", () => {
  const io = openSafetensors("test/fixtures/hf/mixtral-tiny/io.safetensors");
  const { ids, labels } = openCorpus(corpus, reading).batch(0, 4);
  expect(ids).toEqual(io.readInts("input_ids"));
  expect(labels).toEqual(io.readInts("labels"));
  io.close();
});

test("sequential rows follow each other and wrap before the end of the text", () => {
  const opened = openCorpus(corpus, reading);
  const wrap = bytes.length - 4 * 65 - 1;
  for (const step of [0, 1, 19, 136, 137, 5000]) {
    const { ids, labels } = opened.batch(4 * step, 4);
    for (let row = 0; row < 4; row++) {
      const start = ((step * 4 * 64) % wrap) + row * 64;
      expect([...ids.subarray(row * 64, row * 64 + 64)]).toEqual([...bytes.subarray(start, start + 64)]);
      expect([...labels.subarray(row * 64, row * 64 + 64)]).toEqual([...bytes.subarray(start + 1, start + 65)]);
    }
  }
  opened.close();
});

test("shuffled: each epoch visits every window once, in an order of its own, whatever was asked before", () => {
  const path = join(folder, "counted");
  writeFileSync(
    path,
    Uint8Array.from({ length: 61 }, (_, i) => i),
  );
  const shuffled = { ...reading, seq: 4, batch: 3, order: "shuffled" } as const;
  const firsts = (seed: number): number[] => {
    const opened = openCorpus(path, { ...shuffled, seed });
    const samples = Array.from({ length: 10 }, (_, step) => opened.batch(3 * step, 3)).flatMap(({ ids }) => [ids[0]!, ids[4]!, ids[8]!]);
    opened.close();
    return samples;
  };
  const order = firsts(1);
  const all = Array.from({ length: 15 }, (_, i) => 4 * i);
  expect(order.slice(0, 15).sort((a, b) => a - b)).toEqual(all);
  expect(order.slice(15).sort((a, b) => a - b)).toEqual(all);
  expect(firsts(1).slice(0, 15)).not.toEqual(firsts(1).slice(15));
  expect(firsts(2)).not.toEqual(firsts(1));
  const late = openCorpus(path, { ...shuffled, seed: 1 });
  const seventh = late.batch(21, 3);
  late.batch(0, 3);
  expect(late.batch(21, 3)).toEqual(seventh);
  expect([seventh.ids[0], seventh.labels[0]]).toEqual([firsts(1)[21], firsts(1)[21]! + 1]);
});

test("what is wrong with a corpus is said before the first batch", () => {
  const short = join(folder, "short");
  writeFileSync(short, Buffer.alloc(4 * 65 + 1));
  const said = [
    [short, reading],
    [folder, reading],
    [join(folder, "no"), reading],
    [corpus, { ...reading, vocab: 100 }],
  ].map(([path, how]) => {
    try {
      openCorpus(path as string, how as Reading);
    } catch (error) {
      expect(error).toBeInstanceOf(Trouble);
      return (error as Trouble).message.replaceAll(folder, "DIR");
    }
    return "nothing";
  });
  expect(said.join("\n")).toMatchInlineSnapshot(`
    "DIR/short: the corpus has 261 bytes; a batch of 4 rows of 64 takes at least 262
    DIR: the corpus is a directory
    DIR/no: the corpus does not exist
    test/fixtures/corpus.txt: byte 71 of the corpus is 101, outside a vocabulary of 100"
  `);
  writeFileSync(short, Buffer.alloc(4 * 65 + 2));
  openCorpus(short, reading).batch(4 * 12345, 4);
});
