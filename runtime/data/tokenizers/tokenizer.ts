/** What a tokenizer is, and the tokenizer of bytes. The other kinds stand beside this file; openTokenizer.ts chooses one. */

/** Converts text to token ids and back. */
export interface Tokenizer {
  /** The kind in messages, such as `BPE`. */
  readonly kind: string;
  /** The number of ids: all ids are below it. */
  readonly vocab: number;
  /** Appends the ids of a text to `into`. Special tokens such as the begin of a sequence are not added. */
  readonly encode: (text: string, into: number[]) => void;
  /** Returns the text of ids; an id without a token reads as U+FFFD. */
  readonly decode: (ids: Iterable<number>) => string;
  /** Returns the id of a token; undefined if there is no such token. */
  readonly idOf: (token: string) => number | undefined;
  /** The id that the files of the tokenizer name as the end of a document; undefined if they name none. */
  readonly end: number | undefined;
}

/** Each byte of the text in UTF-8 is one id. */
export const bytesTokenizer: Tokenizer = {
  ...{ kind: "bytes", vocab: 256, end: undefined },
  encode: (text, into) => {
    for (const byte of Buffer.from(text)) into.push(byte);
  },
  decode: (ids) => Buffer.from(Uint8Array.from(ids)).toString(),
  idOf: () => undefined,
};
