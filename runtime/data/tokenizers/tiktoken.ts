/** Tokenizers of tiktoken's files: a line for each token, its bytes in base64 and its rank. The file names no pattern of words. */
import { Trouble } from "../../../schemas/trouble.ts";
import { type Merges, mergeAll } from "./bpe.ts";
import { translatePattern } from "./pattern.ts";
import type { Tokenizer } from "./tokenizer.ts";
import { cached } from "./wordCache.ts";

const contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const upper = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
const lower = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
const ends = "\\s+(?!\\S)|\\s+";
const gpt2 = `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|${ends}`;
const o200k = [
  `[^\\r\\n\\p{L}\\p{N}]?${upper}*${lower}+${contractions}?`,
  `[^\\r\\n\\p{L}\\p{N}]?${upper}+${lower}*${contractions}?`,
  `\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|${ends}`,
].join("|");
/** Patterns of words and the id of `<|endoftext|>`, by the name of the encoding: tiktoken_ext/openai_public.py; llama3: Meta's tokenizer.py. */
const encodings: Readonly<Record<string, { readonly pattern: string; readonly end: readonly [token: string, id: number] }>> = {
  r50k_base: { pattern: gpt2, end: ["<|endoftext|>", 50256] },
  p50k_base: { pattern: gpt2, end: ["<|endoftext|>", 50256] },
  cl100k_base: {
    pattern: `'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s+$|\\s*[\\r\\n]|\\s+(?!\\S)|\\s`,
    end: ["<|endoftext|>", 100257],
  },
  o200k_base: { pattern: o200k, end: ["<|endoftext|>", 199999] },
  llama3: {
    pattern: `${contractions}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|${ends}`,
    end: ["<|end_of_text|>", 128001],
  },
};
/** Names of the encodings whose patterns are known. */
export const encodingNames: readonly string[] = Object.keys(encodings);

/** Whether a text is a file of tiktoken, by its first line. */
export const isTiktoken = (text: string): boolean => /^[A-Za-z0-9+/]+={0,2} \d+\r?\n/.test(text);

/**
 * Opens the text of a file. `name`: the encoding. The end of a document is the encoding's, if its id is above all ranks of the file and
 * belongs to it. Special tokens in a text are read as text. Throws a Trouble that names the line.
 */
export function tiktokenTokenizer(text: string, path: string, name: string): Tokenizer {
  const encoding = encodings[name];
  if (encoding === undefined)
    throw new Trouble(`${path}: there is no encoding ${name}`, `name one of ${encodingNames.join(", ")}, which say where words end`);
  const { spelled, ranks, last } = readRanks(text, path);
  const words = translatePattern(encoding.pattern, "rust");
  const merges: Merges = {
    find: (left, right) => ranks.get((spelled.get(left) ?? "") + (spelled.get(right) ?? "")) ?? -1,
    results: Int32Array.from({ length: last + 1 }, (_, id) => id),
  };
  const encodeWord = cached((word, into) => {
    const bytes = Buffer.from(word).toString("latin1");
    const whole = ranks.get(bytes);
    if (whole !== undefined) {
      into.push(whole);
      return;
    }
    const ids = Array.from(bytes, (byte) => ranks.get(byte) ?? -1);
    mergeAll(ids, merges);
    for (const id of ids) into.push(id);
  });
  const [endToken, endId] = encoding.end;
  // a cut-down file of a test has other ids
  const end = endId > last && endId <= last + 256 ? endId : undefined;
  return {
    kind: `tiktoken ${name}`,
    vocab: (end ?? last) + 1,
    encode: (all, into) => {
      for (const word of all.match(words) ?? []) encodeWord(word, into);
    },
    decode: (ids) =>
      Buffer.concat(
        Array.from(ids, (id) =>
          id === end ? Buffer.from(endToken) : Buffer.from(spelled.get(id) ?? "\ufffd", spelled.has(id) ? "latin1" : "utf8"),
        ),
      ).toString(),
    idOf: (token) => (token === endToken ? end : ranks.get(Buffer.from(token).toString("latin1"))),
    end,
  };
}

/** Reads the lines: the bytes of each token, a character for each byte, and its rank. */
function readRanks(text: string, path: string) {
  const spelled = new Map<number, string>();
  const ranks = new Map<string, number>();
  let last = 0;
  for (const [i, line] of text.split("\n").entries()) {
    if (line.trim() === "") continue;
    const [, base64, digits] = /^([A-Za-z0-9+/]+={0,2}) (\d+)\r?$/.exec(line) ?? [];
    if (base64 === undefined) throw new Trouble(`${path}:${i + 1}: the line is no token in base64 and its rank`, "copy the file again");
    const bytes = Buffer.from(base64, "base64").toString("latin1");
    const rank = Number(digits);
    if (ranks.has(bytes) || spelled.has(rank))
      throw new Trouble(`${path}:${i + 1}: the token or its rank stands in the file twice`, "copy the file again");
    spelled.set(rank, bytes);
    ranks.set(bytes, rank);
    last = Math.max(last, rank);
  }
  for (let byte = 0; byte < 256; byte++)
    if (!ranks.has(String.fromCharCode(byte)))
      throw new Trouble(
        `${path}: no token is the single byte 0x${byte.toString(16).padStart(2, "0")}`,
        "copy the file again: it is not complete",
      );
  return { spelled, ranks, last };
}
