/** Tokens → text, for samples that a person reads. */
import { unspellBytes } from "./byteLevel.ts";

/** Returns the text of tokens. */
export type TokensDecoder = (tokens: readonly string[]) => string;

/** Byte-level tokens: each character is a byte. */
export const decodeBytes: TokensDecoder = (tokens) => unspellBytes(tokens.join("")).toString();

/** Pieces of SentencePiece: a mark for each space, `<0xNN>` for a byte. */
export const decodePieces: TokensDecoder = (tokens) =>
  Buffer.concat(
    tokens.map((token) => {
      const byte = /^<0x([0-9A-F]{2})>$/.exec(token)?.[1];
      return byte === undefined ? Buffer.from(token.replaceAll("\u2581", " ")) : Buffer.of(Number.parseInt(byte, 16));
    }),
  )
    .toString()
    .replace(/^ /, "");

/** Word pieces: a prefix marks those that continue a word, a suffix those that end one. */
export const decodeWords =
  (prefix: string, suffix: string): TokensDecoder =>
  (tokens) => {
    let out = "";
    for (const token of tokens) {
      const continues = prefix !== "" && token.startsWith(prefix);
      const text = continues ? token.slice(prefix.length) : token;
      const ends = suffix !== "" && text.endsWith(suffix);
      out += `${continues || suffix !== "" || out === "" ? "" : " "}${ends ? `${text.slice(0, -suffix.length)} ` : text}`;
    }
    return suffix === "" ? out : out.trimEnd();
  };
