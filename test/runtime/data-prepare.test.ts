/** `rankc data prepare` and `inspect`: documents of every format become one Megatron data set, the same bytes by any number of threads. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, truncateSync, utimesSync, writeFileSync } from "node:fs";
import { hostname, tmpdir } from "node:os";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { parquetWriteFile } from "hyparquet-writer";
import { afterAll, expect, test } from "vitest";
import type { Prepared, PrepareSettings } from "../../runtime/data/prepare/prepare.ts";
import { openTokenizer } from "../../runtime/data/tokenizers/openTokenizer.ts";
import { fixture } from "../support/job.ts";
import { megatronIndex } from "../support/megatronIndex.ts";
import { built, rankc } from "../support/rankc.ts";
import { full } from "../support/tiers.ts";

// of the compiled package: its threads start without a loader of TypeScript
const { prepareDataset }: typeof import("../../runtime/data/prepare/prepare.ts") = await import(built("runtime/data/prepare/prepare.ts"));
const { inspectDataset }: typeof import("../../runtime/data/prepare/inspect.ts") = await import(built("runtime/data/prepare/inspect.ts"));
const { Trouble }: typeof import("../../schemas/trouble.ts") = await import(built("schemas/trouble.ts"));

const folder = mkdtempSync(join(tmpdir(), "rankc-prepare-"));
afterAll(() => rmSync(folder, { recursive: true }));
const at = (name: string): string => join(folder, name);
const written = (name: string, content: string | Uint8Array): string => {
  writeFileSync(at(name), content);
  return at(name);
};

/** Compares files by their bytes: a printed difference of megabytes takes all memory. */
const differing = (one: string, other: string, endings: readonly string[] = ["bin", "idx", "json"]): string[] =>
  endings.filter((ending) => !readFileSync(at(`${one}.${ending}`)).equals(readFileSync(at(`${other}.${ending}`))));

const bpe = fixture("tokenizers/llama3.json");
function prepare(inputs: readonly string[], out: string, changed: Partial<PrepareSettings> = {}): Promise<Prepared> {
  return prepareDataset({
    ...{
      inputs,
      prefix: at(out),
      tokenizer: bpe,
      documents: { border: "file", key: "text" },
      threads: 1,
      restart: false,
      overwrite: false,
    },
    ...{ signal: new AbortController().signal, onProgress: () => {} },
    ...changed,
  });
}
/** What a failed call reports, with its fix. */
async function failure(work: Promise<unknown>): Promise<string> {
  const error = await work.then(
    () => undefined,
    (error: unknown) => error,
  );
  return error instanceof Trouble ? `${error.message} | ${error.fix}`.replaceAll(folder, "DIR") : `no Trouble: ${error}`;
}

const texts = Array.from({ length: 3000 }, (_, i) => `${"word ".repeat(i % 12)}ending ${i} größe 😀`);
// a key that is not read fills blocks, without ids to make
const lines = texts.map((text, i) => `${JSON.stringify({ id: i, text, unread: "x".repeat(500) })}\n`).join("");
const end = 0;
const idsOf = (all: readonly string[]): number[][] => {
  const tokenizer = openTokenizer(bpe);
  return all.map((text) => {
    const ids: number[] = [];
    tokenizer.encode(text, ids);
    return [...ids, end];
  });
};
const documentsOf = (prefix: string): number[][] => {
  const { lengths, dtype } = { lengths: lengthsOf(prefix), dtype: inspectDataset(at(prefix), { samples: 1, tokens: 1 }).dtype };
  const bytes = readFileSync(at(`${prefix}.bin`));
  const ids = dtype === "u16" ? new Uint16Array(Uint8Array.from(bytes).buffer) : new Int32Array(Uint8Array.from(bytes).buffer);
  let begin = 0;
  return lengths.map((length) => [...ids.subarray(begin, (begin += length))]);
};
const lengthsOf = (prefix: string): number[] => {
  const idx = readFileSync(at(`${prefix}.idx`));
  return Array.from({ length: Number(idx.readBigUInt64LE(18)) }, (_, i) => idx.readInt32LE(34 + 4 * i));
};

test("one and four threads write the same bytes: the ids of each document with its end, and Megatron's index", async () => {
  const corpus = written("corpus.jsonl", lines);
  const one = await prepare([corpus], "one");
  await prepare([corpus], "four", { threads: 4 });
  expect(differing("four", "one")).toEqual([]);
  const ids = idsOf(texts);
  expect(JSON.stringify(documentsOf("one")) === JSON.stringify(ids)).toBe(true);
  expect(readFileSync(at("one.idx"))).toEqual(
    megatronIndex(
      8,
      2,
      ids.map(({ length }) => length),
    ),
  );
  expect(one).toMatchObject({ documents: 3000, tokens: ids.flat().length, end_of_document: end, vocab: 700, dtype: "u16", stopped: false });
  expect(readdirSync(folder).filter((name) => name.includes("partial"))).toEqual([]);
});

test("gzip of several members, zstd of several frames, Parquet and folders hold the same documents as plain lines", async () => {
  const half = lines.indexOf("\n", lines.length / 2) + 1;
  await prepare([written("two.jsonl.gz", Buffer.concat([gzipSync(lines.slice(0, half)), gzipSync(lines.slice(half))]))], "gz");
  expect(differing("gz", "one", ["bin"])).toEqual([]);
  await prepare([fixture("two-frames.jsonl.zst")], "zst");
  const frames = ["first frame, größe", "second frame 😀"].flatMap((name) =>
    Array.from({ length: 20 }, (_, i) => `document ${i} of the ${name}`),
  );
  expect(documentsOf("zst")).toEqual(idsOf(frames));
  parquetWriteFile({
    filename: at("rows.parquet"),
    columnData: [
      { name: "n", data: texts.map((_, i) => i) },
      { name: "content", data: texts },
    ],
    rowGroupSize: 500,
  });
  await prepare([at("rows.parquet")], "parquet", { documents: { border: "file", key: "content" }, threads: 2 });
  expect(differing("parquet", "one", ["bin"])).toEqual([]);
  mkdirSync(at("tree/b"), { recursive: true });
  for (const [name, text] of Object.entries({
    "tree/c.txt": "third",
    "tree/a.md": "first",
    "tree/b/x.txt": "second",
    "tree/image.png": "no text",
  }))
    written(name, text);
  await prepare([at("tree")], "folder");
  expect(documentsOf("folder")).toEqual(idsOf(["first", "second", "third"]));
});

test("a text is one document, or blank lines or line ends separate its documents; a byte order mark and CRLF are not text", async () => {
  const text = written("text.txt", "\ufeffone\r\nmore\r\n\r\n\n  \ntwo\n\nthree");
  for (const [border, documents] of Object.entries({
    file: ["one\r\nmore\r\n\r\n\n  \ntwo\n\nthree"],
    "blank-line": ["one\r\nmore", "two", "three"],
    line: ["one", "more", "  ", "two", "three"],
  } as const)) {
    await prepare([text], border, { documents: { border: border as "file", key: "text" } });
    expect(documentsOf(border), border).toEqual(idsOf([...documents]));
  }
});

test("two calls at once: the second is refused, a call after an interrupt or a killed process is not", async () => {
  const corpus = written("locked.jsonl", lines);
  const first = prepare([corpus], "locked");
  expect(await failure(prepare([corpus], "locked"))).toMatch(
    /^DIR\/locked: another rankc data prepare writes it: process \d+ on .* \| wait for it, .* remove DIR\/locked\.partial\.lock$/,
  );
  // not with --restart either, which would remove what the first one writes
  expect(await failure(prepare([corpus], "locked", { restart: true }))).toMatch(/another rankc data prepare writes it/);
  await first;
  expect(differing("locked", "one", ["bin", "idx"])).toEqual([]);
  const stop = new AbortController();
  await prepare([written("paused.jsonl", lines.repeat(3))], "paused", { signal: stop.signal, onProgress: () => stop.abort() });
  // the largest id of a process that Linux gives is 2^22
  written("paused.partial.lock", JSON.stringify({ id: "a", host: hostname(), pid: 2 ** 22 + 1, since: "" }));
  expect(await prepare([at("paused.jsonl")], "paused")).toMatchObject({ documents: 9000, stopped: false });
  expect(readdirSync(folder).filter((name) => name.includes("lock"))).toEqual(["locked.bin", "locked.idx", "locked.json", "locked.jsonl"]);
});

test("an interrupted call continues, and other corpora or settings are refused", async () => {
  const corpus = written("long.jsonl", lines.repeat(3));
  const other = written("long.jsonl.gz", gzipSync(lines));
  const stop = new AbortController();
  const stopped = await prepare([corpus, other], "resumed", { signal: stop.signal, onProgress: () => stop.abort() });
  expect(stopped.stopped).toBe(true);
  expect(stopped.documents).toBeGreaterThan(0);
  expect(stopped.documents).toBeLessThan(12_000);
  expect(await failure(prepare([corpus], "resumed"))).toMatch(
    /^DIR\/resumed.partial was begun with another list of corpora, .* \| repeat the command that began it, or add --restart/,
  );
  expect(await failure(prepare([corpus, other], "resumed", { end: "none" }))).toMatch(/another end of documents \|/);
  expect(await failure(Promise.resolve().then(() => inspectDataset(at("resumed"), { samples: 1, tokens: 1 })))).toMatch(
    /does not exist \| the data set is not finished/,
  );
  // a crash after the last record leaves more in the files than the record covers
  writeFileSync(at("resumed.partial/ids"), "more", { flag: "a" });
  const resumed = await prepare([corpus, other], "resumed", { threads: 3 });
  await prepare([corpus, other], "whole");
  expect(resumed).toMatchObject({ documents: 12_000, stopped: false });
  expect(differing("resumed", "whole")).toEqual([]);
  const second = new AbortController();
  await prepare([corpus, other], "changed", { signal: second.signal, onProgress: () => second.abort() });
  utimesSync(corpus, 1, 1);
  expect(await failure(prepare([corpus, other], "changed"))).toMatch(/was begun with another DIR\/long.jsonl \|/);
  expect((await prepare([corpus, other], "changed", { restart: true })).documents).toBe(12_000);
});

test(
  "a call that ended while it moved its files continues; a file shorter than recorded is refused, not padded with zeros",
  full,
  async () => {
    const corpus = written("moved.jsonl", lines);
    await prepare([corpus], "straight");
    // the description cannot take the name of a folder: the ids are moved, the index is not
    mkdirSync(at("moved.json"));
    expect(await failure(prepare([corpus], "moved"))).toMatch(/moved/);
    expect(readdirSync(folder).filter((name) => /^moved\.(bin|idx)$/.test(name))).toEqual(["moved.bin"]);
    rmSync(at("moved.json"), { recursive: true });
    await prepare([corpus], "moved");
    expect(differing("moved", "straight")).toEqual([]);
    for (const name of ["ids", "lengths"]) {
      const short = `short-${name}`;
      mkdirSync(at(`${short}.json`));
      await failure(prepare([corpus], short));
      rmSync(at(`${short}.json`), { recursive: true });
      renameSync(at(`${short}.bin`), at(`${short}.partial/ids`));
      truncateSync(at(`${short}.partial/${name}`), 100);
      expect(await failure(prepare([corpus], short))).toMatch(
        new RegExp(`^DIR/${short}.partial/${name} has 100 of \\d+ bytes \\| add --restart`),
      );
      await prepare([corpus], short, { restart: true });
      expect(differing(short, "straight")).toEqual([]);
    }
  },
);

test("a data set may be named by one of its files, and needs a name", async () => {
  const corpus = written("named.txt", "one\ntwo\n");
  for (const name of ["named.bin", "named.idx"]) expect((await prepare([corpus], name, { overwrite: true })).prefix).toBe(at("named"));
  for (const prefix of ["", ".", `${folder}/`, `${folder}/..`])
    expect(await failure(prepare([corpus], "named", { prefix })), prefix).toMatch(/is no prefix of file names \| add a name/);
});

test("no document follows the last line end, and a small corpus starts one thread", async () => {
  let threads = 0;
  const count = (): void => void threads++;
  process.on("worker", count);
  const corpus = written("ended.txt", "one\ntwo\n\nthree\r\n");
  const prepared = await prepare([corpus], "ended", { documents: { border: "line", key: "text" }, threads: 12 });
  process.removeListener("worker", count);
  expect(prepared).toMatchObject({ documents: 3, empty_documents: 1 });
  expect(threads).toBe(1);
});

test("a fault of a corpus is reported with file and line; of several faults the first, with any number of threads", full, async () => {
  const good = '{"text": "good"}\n';
  const cases: readonly [string, string | Uint8Array][] = [
    ["broken.jsonl", `${good}{"text": \n`],
    ["key.jsonl", `${good}\n{"content": "x", "id": 1}\n`],
    ["number.jsonl", `{"text": 5}\n`],
    ["list.jsonl", `[1]\n`],
    ["latin.txt", Buffer.from("gr\u00fc\u00dfe\nGr\u00fc\u00dfe", "latin1")],
    ["cut.jsonl.gz", gzipSync(lines).subarray(0, 2000)],
    ["cut.jsonl.zst", readFileSync(fixture("two-frames.jsonl.zst")).subarray(0, 100)],
    ["file.jsonl.xz", Buffer.from([0xfd, 0x37, 0x7a, 0x58, 0x5a, 0, 0, 0])],
    ["no.parquet", "PAR1 no PAR1"],
    ["empty.jsonl", "\n"],
  ];
  const messages: string[] = [];
  for (const [name, content] of cases) messages.push(await failure(prepare([written(name, content)], "bad")));
  const column = { name: "content", data: ["a text"] };
  parquetWriteFile({ filename: at("column.parquet"), columnData: [column] });
  const plain = written("plain.jsonl", good);
  await prepare([plain], "there");
  messages.push(await failure(prepare([at("column.parquet")], "bad")));
  messages.push(await failure(prepare([plain], "there")));
  messages.push(await failure(prepare([plain], "bad", { tokenizer: "bytes" })));
  messages.push((await failure(prepare([plain], "bad", { end: "<end>" }))).replace(bpe, "TOKENIZER"));
  messages.push(await failure(prepare([at("missing.jsonl")], "bad")));
  messages.push(await failure(prepare([plain], "no/such/folder/../file.txt\0")));
  expect(messages.join("\n")).toMatchInlineSnapshot(`
    "DIR/broken.jsonl:2: the line is no JSON: Unexpected end of JSON input | each line holds one record: repair the line, or delete it
    DIR/key.jsonl:3: the record has no "text"; its keys are content, id | name the key of the text: --key NAME
    DIR/number.jsonl:1: the record's "text" is no text; its keys are text | name the key of the text: --key NAME
    DIR/list.jsonl:1: the line is no record | name the key of the text: --key NAME
    DIR/latin.txt:1: the line is no UTF-8: it has the byte 0xfc | write the file as UTF-8: iconv -f ISO-8859-1 -t UTF-8 DIR/latin.txt > corpus.txt
    DIR/cut.jsonl.gz: the compressed corpus is damaged or cut: unexpected end of file | copy the file again
    DIR/cut.jsonl.zst: the compressed corpus is damaged or cut: unexpected EOF | copy the file again
    DIR/file.jsonl.xz: the corpus looks like xz; rankc reads text, .jsonl and .parquet, also as .gz and .zst | decompress it first: unxz -k DIR/file.jsonl.xz
    DIR/no.parquet: the Parquet file cannot be read: parquet metadata length 544173600 exceeds available buffer 4 | check the file, for example with pyarrow
    the corpora have no documents with text | see that the files and --key are the right ones
    DIR/column.parquet: the file has no column text; it has content | name the column of the text: --key content
    DIR/there.idx exists already | name another data set after -o, or add --overwrite
    the tokenizer bytes does not say which token ends a document | add --eod none; --eod 0, the byte that no text has; or --eod 256, and set model.vocab to 257 or more
    TOKENIZER: the tokenizer has no token "<end>" | name a token or an id after --eod, or --eod none
    DIR/missing.jsonl: the corpus does not exist | check the path; paths start at the current folder
    "DIR/no/such/file.txt\\u0000" is no prefix of file names | add a name: -o data/corpus writes data/corpus.bin and data/corpus.idx"
  `);
  const many = written("many.jsonl", `${lines}${lines}{"text": 1}\n${lines}${lines}not json\n`);
  const first = await failure(prepare([many], "bad", { threads: 4 }));
  expect(first).toContain('many.jsonl:6001: the record\'s "text" is no text');
  expect(await failure(prepare([many], "bad"))).toBe(first);
  expect(readdirSync(folder).filter((name) => /^bad\.(bin|idx|json)$/.test(name))).toEqual([]);
});

test("the command prints what it wrote, and inspect shows sizes, lengths and decoded text", { timeout: 600_000 }, async () => {
  const corpus = written("small.jsonl", '{"text": "first document"}\n{"text": "second"}\n{"text": ""}\n');
  const made = await rankc("data", "prepare", corpus, "-t", bpe, "-o", at("cli"));
  expect(made.out).toMatch(/cli: 2 documents, \d+ tokens of 700 \(u16\) from 20 B of text in .*; 1 without text left out\n$/);
  const shown = await rankc("data", "inspect", at("cli"));
  expect(shown.out).toContain("# 0         first document\n# 1         second\n");
  const json = JSON.parse((await rankc("data", "inspect", at("cli.bin"), "--format", "json")).out);
  expect(json).toMatchObject({
    documents: 2,
    dtype: "u16",
    samples: [
      { document: 0, text: "first document" },
      { document: 1, text: "second" },
    ],
  });
  const missing = await rankc("data", "inspect", at("nothing"));
  expect([missing.exit, missing.err]).toEqual([2, expect.stringContaining("nothing.idx does not exist")]);
});

test("a text whose first line is a JSON record gives a warning; text in braces, JSON without text and .jsonl do not", async () => {
  const record = '{"text": "one"}\n{"text": "two"}\n';
  const inputs = [
    written("records.txt", record),
    written("records.txt.gz", gzipSync(record)),
    written("braces.txt", "{ not JSON }\n"),
    written("numbers.txt", '{"n": 1}\n'),
    written("records.jsonl", record),
  ];
  const warnings: string[] = [];
  const { documents } = await prepare(inputs, "warned", { onWarning: (warning) => warnings.push(warning) });
  expect(documents).toBe(6);
  expect(warnings.map((warning) => warning.replaceAll(folder, "DIR").split(":")[0])).toEqual(["DIR/records.txt", "DIR/records.txt.gz"]);
  expect(warnings[0]).toContain("Rename it to .jsonl");
});
