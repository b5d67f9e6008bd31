/** Files that are no plain corpus: each is refused by its bytes or its name, or read by its index. */
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { afterAll, expect, test } from "vitest";
import { openCorpus } from "../../runtime/data/corpus.ts";
import { invalidUtf8 } from "../../runtime/data/fileFormat.ts";
import type { Reading } from "../../runtime/train/inputs.ts";
import { openRun } from "../../runtime/train/openRun.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { compile } from "../../src/compile.ts";
import { fixture, jobOf } from "../support/job.ts";
import { littleEndian } from "../support/labels.ts";
import { megatronIndex } from "../support/megatronIndex.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-formats-"));
afterAll(() => rmSync(folder, { recursive: true }));
const reading: Reading = {
  ...{ seq: 8, batch: 2, vocab: 256, order: "sequential", seed: 1, format: "text", dtype: "u16" },
  ...{ weighed: false, weighting: { by: "microbatch", together: 16 }, depths: 0 },
};
const tokens: Reading = { ...reading, format: "tokens" };
const corpus = readFileSync(fixture("corpus.txt"));

const put = (name: string, bytes: Uint8Array | string): string => {
  const path = join(folder, name);
  writeFileSync(path, bytes);
  return path;
};
/** Message and fix of the Trouble in which opening, or the first batch, ends; "read" if it does not. */
function outcome(path: string, how: Reading = reading, labels?: string): string {
  try {
    const opened = openCorpus({ path, labels }, how);
    opened.batch(0, how.batch);
    opened.close();
    return "read";
  } catch (error) {
    expect(error).toBeInstanceOf(Trouble);
    return `${(error as Trouble).message}; ${(error as Trouble).fix}`.replaceAll(`${folder}/`, "");
  }
}

const filler = Buffer.from("plain text ".repeat(40));
const begins = (...start: readonly (number | string)[]): Buffer =>
  Buffer.concat([...start.map((x) => (typeof x === "string" ? Buffer.from(x, "latin1") : Buffer.of(x))), filler]);
const magics = {
  gzip: gzipSync(corpus.subarray(0, 999)),
  "gzip ": begins(0x1f, 0x8b, 8, 8),
  zstd: begins(0x28, 0xb5, 0x2f, 0xfd),
  xz: begins(0xfd, "7zXZ\0"),
  bzip2: begins("BZh91AY&SY"),
  LZ4: begins(0x04, 0x22, 0x4d, 0x18),
  "a zip archive": begins("PK\x03\x04"),
  "a 7z archive": begins("7z", 0xbc, 0xaf, 0x27, 0x1c),
  "a tar archive": Buffer.concat([filler.subarray(0, 257), begins("ustar")]),
  Parquet: begins("PAR1"),
  Arrow: begins("ARROW1"),
  Avro: begins("Obj", 1),
  SQLite: begins("SQLite format 3\0"),
  "a pointer of Git LFS": begins("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
  PDF: begins("%PDF-1.7"),
  "a NumPy array": begins(0x93, "NUMPY", 1, 0),
  HDF5: begins(0x89, "HDF\r\n\x1a\n"),
  "the index of a Megatron data set": begins("MMIDIDX\0\0"),
  "ids with a header of llm.c": littleEndian([20240520, 1, ...Array(254).fill(0), ...corpus], "i32"),
  "ids with a header of llm.c ": littleEndian([20240801, 1, ...Array(254).fill(0), ...corpus], "i32"),
};

test.each(Object.entries(magics))("%s is recognised by its first bytes and refused, as text and as ids", (name, bytes) => {
  for (const [file, how] of [
    ["data.txt", reading],
    ["data.bin", { ...tokens, vocab: 65_536 }],
  ] as const)
    expect(outcome(put(file, bytes), how)).toContain(`${file}: the corpus is read as ${how.format}, and looks like ${name.trim()};`);
  expect(outcome(put("ids.bin", littleEndian(corpus, "u16")), tokens, put("data.i32", bytes))).toContain(`looks like ${name.trim()};`);
});

test("a file is refused by the end of its name, whatever its bytes", () => {
  const names = [
    "gz",
    "zst",
    "parquet",
    "jsonl",
    "ndjson",
    "json",
    "npy",
    "npz",
    "idx",
    "tfrecord",
    "arrow",
    "pt",
    "pkl",
    "h5",
    "JSONL.GZ",
  ];
  expect(names.map((end) => outcome(put(`part.${end}`, corpus)).replace(/; .*/, "")).join("\n")).toMatchInlineSnapshot(`
    "part.gz: the corpus is read as text, and looks like gzip
    part.zst: the corpus is read as text, and looks like zstd
    part.parquet: the corpus is read as text, and looks like Parquet
    part.jsonl: the corpus is read as text, and looks like JSON
    part.ndjson: the corpus is read as text, and looks like JSON
    part.json: the corpus is read as text, and looks like JSON
    part.npy: the corpus is read as text, and looks like a NumPy array
    part.npz: the corpus is read as text, and looks like NumPy arrays
    part.idx: the corpus is read as text, and looks like the index of a Megatron data set
    part.tfrecord: the corpus is read as text, and looks like TFRecord
    part.arrow: the corpus is read as text, and looks like Arrow
    part.pt: the corpus is read as text, and looks like a pickle of PyTorch or Python
    part.pkl: the corpus is read as text, and looks like a pickle of PyTorch or Python
    part.h5: the corpus is read as text, and looks like HDF5
    part.JSONL.GZ: the corpus is read as text, and looks like gzip"
  `);
  expect(outcome(put("part.jsonl", corpus))).toContain("rankc data prepare part.jsonl --tokenizer TOKENIZER --out PREFIX");
  for (const end of ["txt", "md", "py", "dat", "text.v2"]) expect(outcome(put(`part.${end}`, corpus)), end).toBe("read");
});

test.skipIf(process.platform === "win32")("a named pipe is refused without waiting for its writer", () => {
  const pipe = join(folder, "pipe.txt");
  execFileSync("mkfifo", [pipe]);
  expect(outcome(pipe)).toBe("pipe.txt: the corpus is not a regular file; name a file");
});

test("text in another encoding is refused, with the byte that is not UTF-8", () => {
  const text = "Größe und Maß. ".repeat(40);
  const utf16 = Buffer.from(text, "utf16le");
  const latin1 = Buffer.from(text, "latin1");
  const cases: readonly (readonly [string, Uint8Array | string])[] = [
    ["UTF-16 with a mark", Buffer.concat([Buffer.of(0xff, 0xfe), utf16])],
    ["UTF-16BE with a mark", Buffer.concat([Buffer.of(0xff, 0xfe), utf16]).swap16()],
    ["ASCII in UTF-16LE", Buffer.from("plain ".repeat(40), "utf16le")],
    ["ASCII in UTF-16BE", Buffer.from("plain ".repeat(40), "utf16le").swap16()],
    ["ids of four bytes", littleEndian(corpus.subarray(0, 400), "i32")],
    ["Latin-1", latin1],
    ["one wrong byte at the end", Buffer.concat([corpus, Buffer.of(0xc3)])],
  ];
  expect(cases.map(([, bytes]) => outcome(put("text", bytes))).join("\n")).toMatchInlineSnapshot(`
    "text: the corpus is read as text, and looks like UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8 text > corpus.txt
    text: the corpus is read as text, and looks like UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8 text > corpus.txt
    text: the corpus is read as text, and looks like UTF-16 text or token ids; write it as UTF-8: iconv -f UTF-16LE -t UTF-8 text > corpus.txt; or, if it holds token ids, set data.format: tokens and data.dtype
    text: the corpus is read as text, and looks like UTF-16 text or token ids; write it as UTF-8: iconv -f UTF-16BE -t UTF-8 text > corpus.txt; or, if it holds token ids, set data.format: tokens and data.dtype
    text: the corpus is read as text, and looks like binary data: many of its bytes are 0; name a text in UTF-8; or, if it holds token ids, set data.format: tokens and data.dtype
    text: the corpus is no UTF-8 text: byte 2 is 0xf6; write a text in another encoding as UTF-8: iconv -f ISO-8859-1 -t UTF-8 text > corpus.txt; for token ids set data.format: tokens
    text: the corpus is no UTF-8 text: byte 35149 is 0xc3; write a text in another encoding as UTF-8: iconv -f ISO-8859-1 -t UTF-8 text > corpus.txt; for token ids set data.format: tokens"
  `);
  for (const good of [text, `\ufeff${text}`, "日本語😀 ".repeat(40)]) expect(outcome(put("text", good))).toBe("read");
});

test("a long text is checked as it is read: no byte that is not UTF-8 is trained on", () => {
  const bytes = Buffer.alloc(2 ** 24 + 1000, "ä");
  bytes[2 ** 24 + 500] = 0xff;
  const path = put("long", bytes);
  const opened = openCorpus({ path }, reading);
  opened.batch(0, 2); // rows of 9 bytes begin and end inside a character
  expect(() => opened.batch((2 ** 24 + 496) / 8, 1)).toThrow(`byte ${2 ** 24 + 500} is 0xff`);
  opened.close();
});

test("UTF-8 is decoded as RFC 3629 and TextDecoder define it", () => {
  const whole = { first: true, last: true };
  const bad = [
    "80",
    "c0 80",
    "c1 bf",
    "e0 9f bf",
    "ed a0 80",
    "f0 8f bf bf",
    "f4 90 80 80",
    "f5 80 80 80",
    "c3",
    "e2 82",
    "f0 9f 98",
    "c3 28",
  ];
  for (const hex of bad) expect(invalidUtf8(Buffer.from(`41${hex.replaceAll(" ", "")}`, "hex"), whole), hex).toBe(1);
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const decodes = (bytes: Uint8Array): boolean => {
    try {
      decoder.decode(bytes);
      return true;
    } catch {
      return false;
    }
  };
  const edges = [
    0, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1, 0xec, 0xed, 0xef, 0xf0, 0xf3, 0xf4, 0xf5, 0xff,
  ];
  for (const a of edges)
    for (const b of edges)
      for (const c of edges) {
        const bytes = Uint8Array.of(a, b, c, 0x80);
        expect(invalidUtf8(bytes, whole) === undefined, String(bytes)).toBe(decodes(bytes));
      }
  const text = Buffer.from("a😀é€");
  for (let from = 0; from < text.length; from++)
    for (let to = from; to <= text.length; to++)
      expect(invalidUtf8(text.subarray(from, to), { first: from === 0, last: to === text.length })).toBe(undefined);
});

test("PREFIX.idx next to PREFIX.bin gives the type of the ids", () => {
  const text = openCorpus({ path: fixture("corpus.txt") }, reading);
  const lengths = [corpus.length - 300, 100, 200];
  const arrays = [
    [1, Uint8Array, 1],
    [3, Int16Array, 2],
    [4, Int32Array, 4],
    [5, BigInt64Array, 8],
    [8, Uint16Array, 2],
  ] as const;
  for (const [code, kind, width] of arrays) {
    const ids = kind === BigInt64Array ? BigInt64Array.from(corpus, BigInt) : (kind as typeof Int32Array).from(corpus);
    const path = put("set.bin", new Uint8Array(ids.buffer));
    put("set.idx", megatronIndex(code, width, lengths));
    const opened = openCorpus({ path }, tokens);
    for (const step of [0, 7]) expect(opened.batch(2 * step, 2), `code ${code}`).toEqual(text.batch(2 * step, 2));
    opened.close();
  }
  text.close();
});

test("an index that is broken, or not of this file, is refused", () => {
  const path = put("set.bin", littleEndian(corpus, "i32"));
  const good = megatronIndex(4, 4, [corpus.length]);
  const changed = (at: number, byte: number) => {
    const copy = Buffer.from(good);
    copy[at] = byte;
    return copy;
  };
  const indexes = [
    ...[good, changed(0, 0), changed(9, 2), changed(17, 7), changed(17, 1), changed(18, 2), changed(26, 0)],
    ...[
      good.subarray(0, 20),
      good.subarray(0, 60),
      megatronIndex(4, 4, []),
      megatronIndex(4, 4, [5, corpus.length - 6]),
      changed(good.length - 8, 3),
    ],
  ];
  const outcomes = indexes.map((bytes) => {
    put("set.idx", bytes);
    return outcome(path, tokens);
  });
  expect(outcomes.join("\n")).toMatchInlineSnapshot(`
    "read
    set.idx: the index of the corpus does not begin with MMIDIDX; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set
    set.idx: the index of the corpus has version 2, not 1; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set
    set.idx: the index of the corpus says that ids have type 7, which holds no whole numbers; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set
    set.bin: the corpus has 140596 bytes, and its index 35149 ids in u8 (documents: 1); the two files are not of one data set, or one is not complete: write both again
    set.idx: the index of the corpus has 62 bytes; 2 sequences and 2 entries of documents make 74; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set
    set.idx: the index of the corpus has 62 bytes; 1 sequences and 0 entries of documents make 46; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set
    set.idx: the index of the corpus ends at byte 20, in the middle; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set
    set.idx: the index of the corpus has 60 bytes; 1 sequences and 2 entries of documents make 62; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set
    set.idx: the index of the corpus has no documents; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set
    set.bin: the corpus has 140596 bytes, and its index 35148 ids in i32 (documents: 2); the two files are not of one data set, or one is not complete: write both again
    set.idx: the index of the corpus has documents of 3 sequences, and 1 sequences; copy or prepare the data set again; with data.path, the index may be removed and data.dtype set"
  `);
});

test("ids of twice the width without an index are refused: every second one would be 0", () => {
  const i64 = new Uint8Array(BigInt64Array.from(corpus, BigInt).buffer);
  const cases = [
    outcome(put("plain.bin", littleEndian(corpus, "i32")), tokens),
    outcome(put("plain.bin", i64), tokens),
    outcome(put("plain.bin", i64), { ...tokens, dtype: "u32" }),
    outcome(put("plain.bin", littleEndian(corpus, "i32")), { ...tokens, dtype: "u32" }),
    outcome(put("plain.bin", new Uint8Array(9999 * 2)), tokens),
  ];
  expect(cases.join("\n")).toMatchInlineSnapshot(`
    "plain.bin: every second id of the corpus is 0 when it is read as u16: its ids have twice as many bytes; set data.dtype: u32
    plain.bin: every second id of the corpus is 0 when it is read as u16: its ids have twice as many bytes; set data.dtype: u32
    plain.bin: every second id of the corpus is 0 when it is read as u32: its ids have twice as many bytes; write the ids as u32
    read
    read"
  `);
});

test("names that other tools accept are refused with a fix", () => {
  put("my_set_text_document.bin", littleEndian(corpus, "u16"));
  put("my_set_text_document.idx", megatronIndex(8, 2, [corpus.length]));
  mkdirSync(join(folder, "shards"));
  const names = ["my_set_text_document", "my_set", "shards/*.txt", "part-{1,2}.txt", "https:/example.com/c4.txt", "s3:/bucket/c4.bin"];
  const more = ["0.3 a_text_document 0.7 b_text_document", "~/corpus.txt", "shards", "absent.txt"];
  expect([...names, ...more].map((name) => outcome(join(folder, name))).join("\n")).toMatchInlineSnapshot(`
    "my_set_text_document: the corpus is named by the prefix of a Megatron data set; name the file of its ids in data.path: my_set_text_document.bin
    my_set: the corpus is named by the prefix of a Megatron data set; name the file of its ids in data.path: my_set_text_document.bin
    shards/*.txt: the corpus is a pattern of names, and no such file exists; rankc reads one file: join the files first, for example cat part-*.txt > corpus.txt
    part-{1,2}.txt: the corpus is a pattern of names, and no such file exists; rankc reads one file: join the files first, for example cat part-*.txt > corpus.txt
    https:/example.com/c4.txt: the corpus is a URL, and no such file exists; download the file, and name the copy on the disk
    s3:/bucket/c4.bin: the corpus is a URL, and no such file exists; download the file, and name the copy on the disk
    0.3 a_text_document 0.7 b_text_document: the corpus is a blend of data sets, and no such file exists; list its data sets with their weights in data.sources
    ~/corpus.txt: the corpus begins with ~, which only a shell replaces, and no such file exists; write the path of the directory
    shards: the corpus is a directory; name a file
    absent.txt: the corpus does not exist; check the path; data.path starts at the folder of the job or plan; --data-dir names another"
  `);
});

test("a run on Megatron's int32 ids has the losses of the same text", async () => {
  const model = { layers: 1, hidden: 32, heads: 4, vocab: 256, seq: 32 };
  const train = { global_batch: 4, steps: 2, precision: "fp32", optimizer: { lr: 1e-3 } };
  const lossesOf = async (path: string): Promise<number[]> => {
    const run = await openRun(compile(jobOf({ name: "ids", model, train, data: { path }, cluster: { device: "cpu" } })).plan, {
      baseDir: folder,
    });
    const losses = [(await run.step()).loss, (await run.step()).loss];
    await run.close();
    return losses;
  };
  put("ids.bin", littleEndian(corpus, "i32"));
  put("ids.idx", megatronIndex(4, 4, [1000, corpus.length - 1000]));
  expect(await lossesOf("ids.bin")).toEqual(await lossesOf(fixture("corpus.txt")));
});
