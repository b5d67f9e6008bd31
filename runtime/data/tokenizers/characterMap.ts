/**
 * The compiled map of characters of a SentencePiece model (precompiled_charsmap): u32 size of a trie in bytes, the trie, then the
 * replacements, which end in a zero byte. The trie is a double array of u32 (darts-clone): a unit has the label of its byte, an offset to
 * its children, and a leaf behind it where a replacement begins.
 */
import { Trouble } from "../../../schemas/trouble.ts";

/** A map from sequences of bytes to replacements. */
export interface CharacterMap {
  /** Replaces graphemes, else characters, as Hugging Face tokenizers does in `Precompiled`. */
  readonly graphemes: (text: string) => string;
  /** Returns the longest entry that begins at byte `at`: its length and its replacement; undefined if none begins there. */
  readonly longest: (bytes: Uint8Array, at: number) => { readonly length: number; readonly text: string } | undefined;
}

/**
 * Runs of ASCII, and of other characters with one ASCII character at each side, to which they may belong. Between two ASCII characters
 * graphemes always end, but for a line feed after a carriage return.
 */
const RUNS =
  /(?:(?:(?!\n)\p{ASCII})?\P{ASCII}+)+(?:(?!\r)\p{ASCII})?|\p{ASCII}*\n(?=\P{ASCII})|\p{ASCII}+(?=(?!\n)\p{ASCII}\P{ASCII})|\p{ASCII}+/gu;

/** Opens a map. An empty one has no entries. Throws a Trouble if it is damaged. */
export function openCharacterMap(blob: Uint8Array): CharacterMap {
  const view = new DataView(blob.buffer, blob.byteOffset, blob.byteLength);
  const size = blob.length === 0 ? 0 : blob.length < 4 ? -1 : view.getUint32(0, true);
  if (size < 0 || size % 4 !== 0 || 4 + size > Math.max(4, blob.length))
    throw new Trouble("the map of characters of the tokenizer is damaged", "copy the file of the tokenizer again");
  const units = Uint32Array.from({ length: size / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
  const strings = Buffer.from(blob.subarray(4 + size));
  const replacement = (at: number): string => strings.toString("utf8", at, Math.max(at, strings.indexOf(0, at)));
  const offsetOf = (unit: number): number => (unit >>> 10) << ((unit & 0x200) >>> 6);

  /** Visits the entries that begin at `at`, the shortest first; the visitor returns whether to go on. */
  function visit(bytes: Uint8Array, at: number, visitor: (length: number, value: number) => boolean): void {
    let node = offsetOf(units[0] ?? 0);
    for (let i = at; i < bytes.length && units.length > 0; i++) {
      const byte = bytes[i] ?? 0;
      node ^= byte;
      const unit = units[node] ?? 0;
      if (byte === 0 || (unit & 0x800000ff) >>> 0 !== byte) return;
      node ^= offsetOf(unit);
      if ((unit & 0x100) !== 0 && !visitor(i + 1 - at, (units[node] ?? 0) & 0x7fffffff)) return;
    }
  }
  /** The replacement of the shortest entry that begins a chunk. */
  const known = new Map<string, string | undefined>();
  const shortest = (chunk: string): string | undefined => {
    if (known.has(chunk)) return known.get(chunk);
    let found: string | undefined;
    visit(Buffer.from(chunk), 0, (_, value) => {
      found = replacement(value);
      return false;
    });
    known.set(chunk, found);
    return found;
  };
  const byCharacters = (text: string): string => Array.from(text, (c) => shortest(c) ?? c).join("");
  const graphemeOf = (grapheme: string): string =>
    (Buffer.byteLength(grapheme) < 6 ? shortest(grapheme) : undefined) ?? byCharacters(grapheme);
  const segmenter = new Intl.Segmenter(undefined, { granularity: "grapheme" });
  const ascii = Array.from({ length: 128 }, (_, code) => String.fromCharCode(code)).filter((c) => shortest(c) !== undefined);
  const changed = new RegExp(`\\r\\n|[${ascii.map((c) => `\\u{${c.charCodeAt(0).toString(16)}}`).join("")}]`, "gv");
  return {
    graphemes: (text) =>
      text.replace(RUNS, (run) =>
        run.charCodeAt(0) < 128 && (run.length === 1 || run.charCodeAt(1) < 128)
          ? run.replace(changed, graphemeOf)
          : Array.from(segmenter.segment(run), ({ segment }) => graphemeOf(segment)).join(""),
      ),
    longest: (bytes, at) => {
      let found: { length: number; value: number } | undefined;
      visit(bytes, at, (length, value) => {
        found = { length, value };
        return true;
      });
      return found && { length: found.length, text: replacement(found.value) };
    },
  };
}
