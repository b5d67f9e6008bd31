import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, truncateSync, writeFileSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { openSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { openCorpus } from "../../runtime/data/corpus.ts";
import type { Reading } from "../../runtime/train/inputs.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { littleEndian } from "../support/labels.ts";

const corpus = "test/fixtures/corpus.txt";
const bytes = readFileSync(corpus);
const reading: Reading = {
  ...{ seq: 64, batch: 4, vocab: 256, order: "sequential", seed: 1, format: "text", dtype: "u16" },
  weighed: false,
  weighting: { by: "microbatch", together: 128 },
  depths: 0,
};
const folder = mkdtempSync(join(tmpdir(), "rankc-data-"));
afterAll(() => rmSync(folder, { recursive: true }));

test("the first batch is that of the reference run", () => {
  const io = openSafetensors("test/fixtures/hf/mixtral-tiny/io.safetensors");
  const { ids, labels } = openCorpus({ path: corpus }, reading).batch(0, 4);
  expect(ids).toEqual(io.readInts("input_ids"));
  expect(labels).toEqual(io.readInts("labels"));
  io.close();
});

test("sequential rows follow each other and wrap before the end of the text", () => {
  const opened = openCorpus({ path: corpus }, reading);
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

test("shuffled: each epoch visits every window once, in its own order, independent of earlier reads", () => {
  const path = join(folder, "counted");
  writeFileSync(
    path,
    Uint8Array.from({ length: 61 }, (_, i) => i),
  );
  const shuffled = { ...reading, seq: 4, batch: 3, order: "shuffled" } as const;
  const firsts = (seed: number): number[] => {
    const opened = openCorpus({ path }, { ...shuffled, seed });
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
  const late = openCorpus({ path }, { ...shuffled, seed: 1 });
  const seventh = late.batch(21, 3);
  late.batch(0, 3);
  expect(late.batch(21, 3)).toEqual(seventh);
  expect([seventh.ids[0], seventh.labels[0]]).toEqual([firsts(1)[21], firsts(1)[21]! + 1]);
});

test("faults of a corpus are reported before the first batch", () => {
  const short = join(folder, "short");
  writeFileSync(short, " ".repeat(4 * 65 + 1));
  const printed = [
    [short, reading],
    [folder, reading],
    [join(folder, "no"), reading],
    [corpus, { ...reading, vocab: 100 }],
  ].map(([path, how]) => {
    try {
      openCorpus({ path: path as string }, how as Reading);
    } catch (error) {
      expect(error).toBeInstanceOf(Trouble);
      return (error as Trouble).message.replaceAll(folder, "DIR");
    }
    return "nothing";
  });
  expect(printed.join("\n")).toMatchInlineSnapshot(`
    "DIR/short: the corpus has 261 bytes; a batch of 4 rows of 64 needs at least 262
    DIR: the corpus is a directory
    DIR/no: the corpus does not exist
    test/fixtures/corpus.txt: byte 71 of the corpus is 101, outside a vocabulary of 100"
  `);
  writeFileSync(short, " ".repeat(4 * 65 + 2));
  openCorpus({ path: short }, reading).batch(4 * 12345, 4);
});

/** The Trouble that opening, or the first batch, ends in. */
function printed(files: Parameters<typeof openCorpus>[0], how: Reading): string {
  try {
    openCorpus(files, how).batch(0, how.batch);
  } catch (error) {
    expect(error).toBeInstanceOf(Trouble);
    return (error as Trouble).message.replaceAll(folder, "DIR");
  }
  return "nothing";
}
const write = (name: string, numbers: ArrayLike<number>, dtype: Parameters<typeof littleEndian>[1]): string => {
  const path = join(folder, name);
  writeFileSync(path, littleEndian(numbers, dtype));
  return path;
};
const upTo = (length: number, of: (i: number) => number = (i) => i): number[] => Array.from({ length }, (_, i) => of(i));

test("ids of two and of four bytes are read as a text of the same tokens is, in either order", () => {
  for (const order of ["sequential", "shuffled"] as const) {
    const text = openCorpus({ path: corpus }, { ...reading, order });
    for (const dtype of ["u16", "u32"] as const) {
      const ids = openCorpus({ path: write(`bytes.${dtype}`, bytes, dtype) }, { ...reading, order, format: "tokens", dtype });
      for (const step of [0, 3, 200]) expect(ids.batch(4 * step, 4)).toEqual(text.batch(4 * step, 4));
      ids.close();
    }
    text.close();
  }
});

test("ids above 16 bits, and in files larger than memory, are read at their positions", () => {
  const path = join(folder, "large.bin");
  // 120 GB, all but nothing of it on the disk
  const tokens = 30e9;
  writeFileSync(path, "");
  truncateSync(path, 4 * tokens);
  const large: Reading = { ...reading, seq: 8, batch: 1, vocab: 200_000, format: "tokens", dtype: "u32" };
  const step = 3.5e9;
  const file = openSync(path, "r+");
  writeSync(file, littleEndian([129_999, 1, 2], "u32"), 0, 12, 4 * 8 * step);
  closeSync(file);
  const before = process.memoryUsage().rss;
  const opened = openCorpus({ path }, large);
  expect([...opened.batch(step, 1).ids]).toEqual([129_999, 1, 2, 0, 0, 0, 0, 0]);
  expect([...opened.batch(step, 1).labels]).toEqual([1, 2, 0, 0, 0, 0, 0, 0]);
  expect([...opened.batch(step - 1, 1).labels]).toEqual([0, 0, 0, 0, 0, 0, 0, 129_999]);
  opened.close();
  expect(process.memoryUsage().rss - before).toBeLessThan(2 ** 28);
});

test("a label belongs to its token, and is the target of the token before", () => {
  const ids = write("ids.bin", upTo(40), "u16");
  const labels = write(
    "labels.bin",
    upTo(40, (i) => (i % 5 < 2 ? -100 : i)),
    "i32",
  );
  const how: Reading = { ...reading, seq: 6, batch: 2, format: "tokens", weighed: true, weighting: { by: "token", together: 6 } };
  const opened = openCorpus({ path: ids, labels }, how);
  expect(opened.batch(0, 2)).toEqual({
    ids: Int32Array.from(upTo(12)),
    labels: Int32Array.of(-100, 2, 3, 4, -100, -100, 7, 8, 9, -100, -100, 12),
    weights: Float32Array.from([0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1], (x) => x / 7),
    aux_weight: Float32Array.of(12 / 7),
  });
  opened.close();
  const each = openCorpus({ path: ids, labels }, { ...how, weighting: { by: "microbatch", together: 6 } });
  // three labels in the first microbatch, four in the second
  expect(each.batch(0, 2).weights).toEqual(Float32Array.from([0, 1 / 6, 1 / 6, 1 / 6, 0, 0, 1 / 8, 1 / 8, 1 / 8, 0, 0, 1 / 8]));
  // balancing losses of a step count in full as soon as one of its tokens has a label
  expect(each.batch(0, 2).aux_weight).toEqual(Float32Array.of(1));
  // of a batch that is half as large, weights add up to one half: the runtime multiplies the losses of such a step by 2
  expect(each.batch(0, 1).weights).toEqual(Float32Array.from([0, 1, 1, 1, 0, 0], (x) => x / 6));
  each.close();
});

test("faults of ids and labels are reported with their place", () => {
  const ids = write("few.bin", upTo(40), "u16");
  const small: Reading = { ...reading, seq: 6, batch: 2, format: "tokens" };
  const odd = join(folder, "odd.bin");
  writeFileSync(odd, Buffer.alloc(81));
  const labels = (name: string, of: number[]) => printed({ path: ids, labels: write(name, of, "i32") }, small);
  expect(
    [
      printed({ path: odd }, small),
      printed({ path: odd }, { ...small, dtype: "u32" }),
      printed({ path: ids }, { ...small, seq: 20 }),
      printed({ path: ids }, { ...small, vocab: 9 }),
      printed({ path: ids }, { ...small, vocab: 14 }),
      printed(
        {
          path: write(
            "minus.bin",
            upTo(40, () => -1),
            "i32",
          ),
        },
        { ...small, dtype: "u32" },
      ),
      labels("short", upTo(39)),
      labels(
        "negative",
        upTo(40, (i) => (i === 7 ? -1 : i)),
      ),
      labels(
        "outside",
        upTo(40, () => 256),
      ),
      printed({ path: ids, labels: join(folder, "no") }, small),
    ].join("\n"),
  ).toMatchInlineSnapshot(`
    "DIR/odd.bin: the corpus has 81 bytes, which is no whole number of ids in u16
    DIR/odd.bin: the corpus has 81 bytes, which is no whole number of ids in u32
    DIR/few.bin: the corpus has 40 tokens; a batch of 2 rows of 20 needs at least 44
    DIR/few.bin: token 9 of the corpus is 9, outside a vocabulary of 9
    nothing
    DIR/minus.bin: token 0 of the corpus is 4294967295, outside a vocabulary of 256
    DIR/short: 156 bytes of labels are 39 in i32, and the corpus DIR/few.bin has 40 tokens
    DIR/negative: label 7 is -1: neither -100, which is ignored, nor an id of a vocabulary of 256
    DIR/outside: label 1 is 256: neither -100, which is ignored, nor an id of a vocabulary of 256
    DIR/no: the file of labels does not exist"
  `);
});
