/**
 * Ids of tokenizers: 10,000 lines of prose, code, many scripts, emoji, control characters and look-alikes of special tokens encode as
 * tokenizers 0.23.2, sentencepiece 0.2.2 and tiktoken 0.14.0 encode them (test/fixtures/tokenizers/make.py).
 */
import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { afterAll, expect, test } from "vitest";
import { mergeAll } from "../../runtime/data/tokenizers/bpe.ts";
import { openTokenizer } from "../../runtime/data/tokenizers/openTokenizer.ts";
import { translatePattern } from "../../runtime/data/tokenizers/pattern.ts";
import { protoFields } from "../../runtime/data/tokenizers/protobuf.ts";
import type { Tokenizer } from "../../runtime/data/tokenizers/tokenizer.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { fixture } from "../support/job.ts";
import { isFull } from "../support/tiers.ts";

const at = (name: string): string => fixture(`tokenizers/${name}`);
const unzipped = (name: string): Buffer => gunzipSync(readFileSync(at(name)));
const lines: readonly string[] = JSON.parse(unzipped("lines.json.gz").toString());
const expected: Readonly<Record<string, { first: number[][]; tokens: number; blocks: string[] }>> = JSON.parse(
  readFileSync(at("expected.json"), "utf8"),
);
const folder = mkdtempSync(join(tmpdir(), "rankc-tokenizers-"));
afterAll(() => rmSync(folder, { recursive: true }));

const fieldOf = (message: Uint8Array, number: number): Uint8Array => {
  for (const field of protoFields(message)) if (field.number === number) return field.bytes;
  throw new Error(`no field ${number}`);
};

/** Opens a tokenizer of the fixtures: models are compressed, and the map of characters of xlmr stands in sp-unigram.model alone. */
function opened(name: string): Tokenizer {
  const [kind, encoding] = name.split(":");
  if (kind === "tiktoken") return openTokenizer(at("small.tiktoken"), encoding);
  const path = join(folder, name);
  if (name.startsWith("sp-")) writeFileSync(path, unzipped(`${name}.model.gz`));
  else {
    const map = fieldOf(fieldOf(unzipped("sp-unigram.model.gz"), 3), 2);
    writeFileSync(
      path,
      readFileSync(at(`${name}.json`), "utf8").replace('"sp-unigram"', JSON.stringify(Buffer.from(map).toString("base64"))),
    );
  }
  return openTokenizer(path);
}
const idsOf = (tokenizer: Tokenizer, text: string): number[] => {
  const ids: number[] = [];
  tokenizer.encode(text, ids);
  return ids;
};

const BLOCK = 50;
test.each(Object.keys(expected))("%s gives the ids of the reference library", (name) => {
  const { first, tokens, blocks } = expected[name] ?? { first: [], tokens: 0, blocks: [] };
  const tokenizer = opened(name);
  expect(first.map((_, i) => idsOf(tokenizer, lines[i + 4] ?? ""))).toEqual(first);
  expect(lines.length).toBe(BLOCK * blocks.length);
  const wrong: string[] = [];
  let count = 0;
  // the fast tier encodes every fourth block
  for (let block = 0; block < blocks.length; block += isFull ? 1 : 4) {
    const of = lines.slice(block * BLOCK, (block + 1) * BLOCK).map((line) => idsOf(tokenizer, line));
    const digest = createHash("sha256").update(Uint32Array.from(of.flatMap((ids) => [ids.length, ...ids])));
    if (digest.digest("hex").slice(0, 12) !== blocks[block]) wrong.push(`lines ${block * BLOCK} to ${(block + 1) * BLOCK}`);
    count += of.reduce((sum, ids) => sum + ids.length, 0);
    expect(of.flat().every((id) => id >= 0 && id < tokenizer.vocab)).toBe(true);
  }
  expect(wrong).toEqual([]);
  if (isFull) expect(count).toBe(tokens);
});

test("byte-level ids read back as the text that they encode", () => {
  for (const name of ["gpt2", "llama3", "tiktoken:o200k_base", "sp-bytes"]) {
    const tokenizer = opened(name);
    // gpt2 has added tokens that take spaces with them; sp-bytes puts a space in front
    const plain = lines.filter((line) => !/mask|SINGLE|\|user\||▁/.test(line) && !line.startsWith(" "));
    expect(plain.length).toBeGreaterThan(5000);
    for (const line of plain.slice(0, 500)) expect(tokenizer.decode(idsOf(tokenizer, line))).toBe(line);
  }
  const bytes = openTokenizer("bytes");
  expect(idsOf(bytes, "aé")).toEqual([97, 0xc3, 0xa9]);
  expect(bytes.decode([97, 0xc3, 0xa9])).toBe("aé");
});

test("a long run without spaces takes time that grows with its length, not with its square", () => {
  const tokenizer = opened("gpt2");
  const length = 400_000;
  const ids = idsOf(tokenizer, "a".repeat(length));
  expect(tokenizer.decode(ids).length).toBe(length);
});

test("merges go by rank, and of equal ranks the leftmost is first", () => {
  const find = (left: number, right: number): number => (left === 1 && right === 1 ? 0 : left === 2 && right === 1 ? 1 : -1);
  const merged = (ids: number[], ranks?: Int32Array): number[] => {
    mergeAll(ids, { find, results: Int32Array.of(2, 3), ...(ranks && { ranks }) });
    return ids;
  };
  expect(merged([1, 1, 1])).toEqual([3]);
  expect(merged([1, 1, 1, 1])).toEqual([2, 2]);
  expect(merged([1, 1, 1, 1], Int32Array.of(0, 0))).toEqual([3, 1]);
  expect(merged([])).toEqual([]);
});

test("patterns of other engines are translated, or refused by name", () => {
  const all = (source: string, text: string, dialect: "oniguruma" | "rust" = "oniguruma"): readonly string[] =>
    text.match(translatePattern(source, dialect)) ?? [];
  expect(all("(?i:'s|k)", "'S K \u212a '\u017f k")).toEqual(["'S", "K", "\u212a", "'\u017f", "k"]);
  expect(all("\\s", "a\u0085\ufeff")).toEqual(["\u0085"]);
  expect(all("a++a", "aaa")).toEqual([]);
  expect(all("a{1,2}+a", "aaa", "rust")).toEqual(["aaa"]);
  expect(all("(?>a|ab)c", "abc")).toEqual([]);
  expect(all("[\\p{L}&&[^\\p{Han}]]+", "ab中c")).toEqual(["ab", "c"]);
  expect(all("a$", "a\na")).toEqual(["a", "a"]);
  expect(all("a$", "a\na", "rust")).toEqual(["a"]);
  const refused = ["(a)\\1", "\\bword", "(?<name>a)", "[[:graph:]]", "\\p{Nonsense}", "(a", "a)"].map((source) => {
    try {
      translatePattern(source, "oniguruma");
    } catch (error) {
      return error instanceof Trouble ? error.message : String(error);
    }
    return "nothing";
  });
  expect(refused.join("\n")).toMatchInlineSnapshot(`
    "the pattern (a)\\1 uses \\1 at character 3, which rankc does not translate
    the pattern \\bword uses \\b at character 0, which rankc does not translate
    the pattern (?<name>a) uses (?<n at character 0, which rankc does not translate
    the pattern [[:graph:]] uses [:graph:] at character 1, which rankc does not translate
    the pattern \\p{Nonsense} uses \\p{Nonsense} at character 0, which rankc does not translate
    the pattern (a uses ( without ) at character 2, which rankc does not translate
    the pattern a) uses ) without ( at character 1, which rankc does not translate"
  `);
});

test("a tokenizer that rankc does not compute, or a damaged one, is refused with the component or the line", () => {
  const gpt2 = JSON.parse(readFileSync(at("gpt2.json"), "utf8"));
  const written = (name: string, content: string | Uint8Array): string => {
    writeFileSync(join(folder, name), content);
    return join(folder, name);
  };
  const json = (change: object): string => written("changed.json", JSON.stringify({ ...gpt2, ...change }));
  const model = unzipped("sp-bpe.model.gz");
  const cases: readonly (() => string)[] = [
    () => json({ pre_tokenizer: { type: "Sequence", pretokenizers: [{ type: "UnicodeScripts" }] } }),
    () => json({ normalizer: { type: "Nmt" } }),
    () => json({ model: { type: "Magic", vocab: {} } }),
    () => json({ model: { ...gpt2.model, dropout: 0.1 } }),
    () => json({ model: { ...gpt2.model, merges: ["no token"] } }),
    () => json({ added_tokens: [{ content: "<x>" }] }),
    () => json({ normalizer: { type: "StripAccents" }, pre_tokenizer: { type: "Metaspace", prepend_scheme: "first" } }),
    () => written("cut.json", '{"model": {'),
    () => written("cut.model", model.subarray(0, 1000)),
    () => written("text.model", "only text\n"),
    () => written("some.tiktoken", "IQ== 0\nIg== 1\n"),
    () => written("cl100k_base.tiktoken", "IQ== 0\nIg== x\n"),
    () => written("cl100k_base.tiktoken", "IQ== 0\nIg== 1\n"),
    () => folder,
    () => join(folder, "missing.json"),
  ];
  const messages = cases.map((path) => {
    try {
      openTokenizer(path());
    } catch (error) {
      return error instanceof Trouble ? error.message.replaceAll(folder, "DIR") : `bug: ${error}`;
    }
    return "nothing";
  });
  expect(messages.join("\n")).toMatchInlineSnapshot(`
    "DIR/changed.json: rankc has no pre_tokenizer UnicodeScripts; it has ByteLevel, Split, Metaspace, Whitespace, WhitespaceSplit, BertPreTokenizer, Punctuation, Digits, CharDelimiterSplit, Sequence
    DIR/changed.json: rankc has no normalizer Nmt; it has NFC, NFD, NFKC, NFKD, Lowercase, Strip, StripAccents, Prepend, Replace, BertNormalizer, Precompiled, ByteLevel, Sequence
    DIR/changed.json: rankc has no model Magic; it has BPE, Unigram, WordPiece, WordLevel
    DIR/changed.json: model.dropout 0.1 makes ids random
    DIR/changed.json: a merge names "no", which the vocabulary lacks
    DIR/changed.json: added_tokens.0.id: Invalid input: expected number, received undefined
    DIR/changed.json: Metaspace has prepend_scheme first, behind a normalizer that removes characters
    DIR/cut.json: the tokenizer is no valid JSON: Expected property name or '}' in JSON at position 11
    DIR/cut.model: the file is no SentencePiece model, or a damaged one: it lacks pieces or settings
    DIR/text.model: the file is no SentencePiece model, or a damaged one: wire type 7
    DIR/some.tiktoken: the tokenizer is a file of tiktoken, which does not say where words end
    DIR/cl100k_base.tiktoken:2: the line is no token in base64 and its rank
    DIR/cl100k_base.tiktoken: no token is the single byte 0x00
    DIR: the folder has neither tokenizer.json nor tokenizer.model
    DIR/missing.json: the tokenizer does not exist"
  `);
});

test("truncation and padding of a tokenizer.json do not change the ids of a document", () => {
  const own = JSON.parse(readFileSync(fixture("tokenizers/llama3.json"), "utf8"));
  const folder = mkdtempSync(join(tmpdir(), "rankc-truncation-"));
  const path = join(folder, "tokenizer.json");
  const truncation = { max_length: 2, stride: 0, strategy: "LongestFirst", direction: "Right" };
  const padding = { strategy: { Fixed: 64 }, direction: "Right", pad_to_multiple_of: null, pad_id: 0, pad_type_id: 0, pad_token: "x" };
  writeFileSync(path, JSON.stringify({ ...own, truncation, padding }));
  const idsOf = (at: string): number[] => {
    const ids: number[] = [];
    openTokenizer(at).encode("some words of a document that is longer than two tokens", ids);
    return ids;
  };
  expect(idsOf(path)).toEqual(idsOf(fixture("tokenizers/llama3.json")));
  expect(idsOf(path).length).toBeGreaterThan(2);
  rmSync(folder, { recursive: true });
});
