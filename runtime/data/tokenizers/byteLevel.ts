/** The characters that stand for bytes in byte-level vocabularies, as in GPT-2's encoder.py: printable bytes are themselves. */

const printable = (byte: number): boolean => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173 && byte < 256);
let others = 0;
/** The character of each byte. */
const byteCharacters: readonly string[] = Array.from({ length: 256 }, (_, byte) =>
  String.fromCharCode(printable(byte) ? byte : 256 + others++),
);
const byteOf = new Map(byteCharacters.map((c, byte) => [c, byte]));
const plain = /^[!-~]*$/;

/** Returns the UTF-8 bytes of a text, a character for each. */
export function spellBytes(text: string): string {
  if (plain.test(text)) return text;
  let out = "";
  for (const byte of Buffer.from(text)) out += byteCharacters[byte];
  return out;
}

/** Returns the bytes that the characters stand for; other characters are their UTF-8 bytes. */
export const unspellBytes = (text: string): Buffer =>
  Buffer.concat(Array.from(text, (c) => (byteOf.has(c) ? Buffer.of(byteOf.get(c) ?? 0) : Buffer.from(c))));
