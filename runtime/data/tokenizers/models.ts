/** Models of tokenizer.json: a word → its ids. The behaviour is that of Hugging Face tokenizers 0.23. */
import { Trouble } from "../../../schemas/trouble.ts";
import { bpeOf, byteTokens } from "./bpe.ts";
import type { ModelConfig, UnigramConfig, WordPieceConfig } from "./tokenizerFile.ts";
import { splitterOf } from "./unigram.ts";

/** Appends the ids of a word. */
export type WordModel = (word: string, into: number[]) => void;

/** Returns the model that a file describes, and its vocabulary. Throws a Trouble if it is inconsistent. */
export function modelOf(config: ModelConfig, path: string): { readonly model: WordModel; readonly vocab: ReadonlyMap<string, number> } {
  switch (config.type) {
    case "BPE":
      return { model: bpeOf(config, path), vocab: new Map(Object.entries(config.vocab)) };
    case "Unigram":
      return unigramOf(config, path);
    case "WordPiece":
      return { model: wordPieceOf(config, path), vocab: new Map(Object.entries(config.vocab)) };
    case "WordLevel": {
      const vocab = new Map(Object.entries(config.vocab));
      const unknown = vocab.get(config.unk_token);
      return {
        vocab,
        model: (word, into) => {
          const id = vocab.get(word) ?? unknown;
          if (id === undefined) throw unknownMissing(path, config.unk_token);
          into.push(id);
        },
      };
    }
    default:
      return config satisfies never;
  }
}

const unknownMissing = (path: string, token: string): Trouble =>
  new Trouble(
    `${path}: a text has a word that needs the unknown token ${JSON.stringify(token)}, which the vocabulary lacks`,
    "use a complete tokenizer",
  );

function wordPieceOf(config: WordPieceConfig, path: string): WordModel {
  const vocab = new Map(Object.entries(config.vocab));
  const unknown = vocab.get(config.unk_token);
  const longest = Array.from(vocab.keys()).reduce((most, { length }) => Math.max(most, length), 0);
  const piecesOf = (word: string): number[] | undefined => {
    const ids: number[] = [];
    for (let start = 0; start < word.length; ) {
      const head = start > 0 ? config.continuing_subword_prefix : "";
      let end = Math.min(word.length, start + longest);
      let id = vocab.get(head + word.slice(start, end));
      while (id === undefined && --end > start) id = vocab.get(head + word.slice(start, end));
      if (id === undefined) return undefined;
      ids.push(id);
      start = end;
    }
    return ids;
  };
  return (word, into) => {
    const ids = Array.from(word).length > config.max_input_chars_per_word ? undefined : piecesOf(word);
    if (ids === undefined && unknown === undefined) throw unknownMissing(path, config.unk_token);
    for (const id of ids ?? [unknown ?? 0]) into.push(id);
  };
}

/** unigram/model.rs: what a character without a piece costs beside the rarest piece. */
const UNKNOWN_PENALTY = 10;

function unigramOf(config: UnigramConfig, path: string): ReturnType<typeof modelOf> {
  const { unk_id, byte_fallback } = config;
  const vocab = new Map(config.vocab.map(([token], id) => [token, id]));
  if (unk_id !== null && unk_id >= config.vocab.length)
    throw new Trouble(
      `${path}: model.unk_id is ${unk_id}, and the vocabulary has ${config.vocab.length} pieces`,
      "use a complete tokenizer",
    );
  const bytes = byte_fallback ? byteTokens((token) => vocab.get(token)) : [];
  const smallest = config.vocab.reduce((least, [, score]) => Math.min(least, score), Number.POSITIVE_INFINITY);
  const split = splitterOf(
    config.vocab.map(([text, score], id) => ({ text, id, score })),
    { unknownScore: smallest - UNKNOWN_PENALTY, round: (sum) => sum },
  );
  const spelled = (text: string): readonly number[] => {
    const whole = vocab.get(text);
    if (whole !== undefined) return [whole];
    const ids = Array.from(Buffer.from(text), (byte) => bytes[byte]).filter((id) => id !== undefined);
    if (byte_fallback && ids.length === Buffer.byteLength(text)) return ids;
    if (unk_id === null)
      throw new Trouble(`${path}: a text has ${JSON.stringify(text)}, and the tokenizer no unknown token`, "set model.unk_id");
    return [unk_id];
  };
  const model: WordModel = (word, into) => {
    let unknown = "";
    const flush = (): void => {
      if (unknown !== "") into.push(...spelled(unknown));
      unknown = "";
    };
    for (const { text, id } of split(word)) {
      // neighbours without a piece become one token; so does the unknown token where the text spells it
      if (id === undefined || id === unk_id) unknown += text;
      else {
        flush();
        into.push(id);
      }
    }
    flush();
  };
  return { model, vocab };
}
