/**
 * Tokenizers of SentencePiece's tokenizer.model: one message ModelProto (sentencepiece_model.proto). Field 1: pieces {1 text, 2 score,
 * 3 type}, the position is the id; 2: trainer {3 type of the model, 24 space mark behind words, 35 bytes for unknown characters, 41
 * begin and 42 end of a sequence}; 3: normalizer {2 map of characters, 3 a space in front, 4 spaces removed, 5 spaces marked}.
 */
import { Trouble } from "../../../schemas/trouble.ts";
import { byteTokens, type Merges, mergeAll } from "./bpe.ts";
import { openCharacterMap } from "./characterMap.ts";
import { decodePieces } from "./decoders.ts";
import { literally } from "./pattern.ts";
import { protoFields } from "./protobuf.ts";
import type { Tokenizer } from "./tokenizer.ts";
import { type SplitPiece, splitterOf } from "./unigram.ts";
import { cached } from "./wordCache.ts";

const types = { normal: 1, unknown: 2, control: 3, user: 4, unused: 5, byte: 6 } as const;
const MARK = "\u2581";

interface Piece {
  readonly text: string;
  readonly id: number;
  readonly score: number;
  readonly type: number;
}
interface Model {
  readonly pieces: readonly Piece[];
  readonly type: number;
  readonly byteFallback: boolean;
  readonly end: number;
  readonly map: Uint8Array;
  readonly prefix: boolean;
  readonly trims: boolean;
}

/** Opens the bytes of a model. Throws a Trouble that names what rankc does not compute. */
export function sentencePieceTokenizer(bytes: Uint8Array, path: string): Tokenizer {
  const model = readModel(bytes, path);
  const { pieces } = model;
  const unknown = pieces.find(({ type }) => type === types.unknown)?.id;
  if (unknown === undefined) throw new Trouble(`${path}: no piece is the unknown one`, "copy the file again");
  const ids = new Map(pieces.map(({ text, id }) => [text, id]));
  const fallback = model.byteFallback ? byteTokens((token) => ids.get(token)) : [];
  const user = pieces.filter(({ type }) => type === types.user).map(({ text }) => text);
  const symbols =
    user.length === 0
      ? undefined
      : new RegExp(
          user
            .sort((a, b) => b.length - a.length)
            .map(literally)
            .join("|"),
          "gv",
        );
  const normalize = normalizerOf(model, symbols);
  const append = (found: readonly SplitPiece[], into: number[]): void => {
    let wasUnknown = false;
    for (const { text, id } of found) {
      const spelled = id === undefined ? Array.from(Buffer.from(text), (byte) => fallback[byte]).filter((byte) => byte !== undefined) : [];
      if (id !== undefined) into.push(id);
      else if (model.byteFallback) into.push(...spelled);
      else if (!wasUnknown) into.push(unknown);
      wasUnknown = id === undefined;
    }
  };
  const split = model.type === 1 ? unigram(pieces) : pairs(pieces, symbols);
  return {
    kind: model.type === 1 ? "SentencePiece Unigram" : "SentencePiece BPE",
    vocab: pieces.length,
    encode: (text, into) => append(split(normalize(text)), into),
    decode: (all) => decodePieces(Array.from(all, (id) => pieces[id]?.text ?? "\ufffd")),
    idOf: (token) => ids.get(token),
    end: model.end >= 0 && model.end < pieces.length ? model.end : undefined,
  };
}

/** unigram_model.cc: sums of scores are float32; a symbol of the user gains a bonus by its length, so that no split is better. */
function unigram(pieces: readonly Piece[]): (text: string) => SplitPiece[] {
  const normal = pieces.filter(({ type }) => type === types.normal);
  const smallest = normal.reduce((least, { score }) => Math.min(least, score), normal[0]?.score ?? 0);
  const scored = pieces
    .filter(({ type }) => type === types.normal || type === types.user)
    .map(({ text, id, score, type }) => ({ text, id, score: type === types.user ? 0.1 * (Buffer.byteLength(text) - 1) : score }));
  return splitterOf(scored, { unknownScore: Math.fround(smallest - 10), round: Math.fround });
}

/** bpe_model.cc: neighbours whose text is a piece are merged, the highest score first; symbols of the user are never merged. */
function pairs(pieces: readonly Piece[], symbols: RegExp | undefined): (text: string) => SplitPiece[] {
  const known = pieces.filter(({ type }) => type === types.normal || type === types.user);
  const ids = new Map(known.map(({ text, id }) => [text, id]));
  const ranks = new Int32Array(pieces.length);
  let rank = 0;
  const byScore = [...known].sort((a, b) => b.score - a.score);
  for (const [i, { id, score }] of byScore.entries()) {
    if (i > 0 && byScore[i - 1]?.score !== score) rank++;
    ranks[id] = rank;
  }
  /** Texts of the characters without a piece get ids above those of the pieces. */
  const texts = pieces.map(({ text }) => text);
  const strangers = new Map<string, number>();
  const idOf = (c: string): number => {
    const found = ids.get(c) ?? strangers.get(c);
    if (found !== undefined) return found;
    strangers.set(c, texts.length);
    return texts.push(c) - 1;
  };
  const merges: Merges = {
    find: (left, right) => ids.get((texts[left] ?? "") + (texts[right] ?? "")) ?? -1,
    results: Int32Array.from(pieces, ({ id }) => id),
    ranks,
  };
  const merge = cached((word, into) => {
    const own = Array.from(word, idOf);
    mergeAll(own, merges);
    into.push(...own);
  });
  const crosses = known.some(({ text }) => /[^\u2581]\u2581/u.test(text));
  const words = crosses ? /[\s\S]+/g : /\u2581*[^\u2581]+|\u2581+/g;
  return (text) => {
    const found: number[] = [];
    const plain = (part: string): void => {
      for (const [word] of part.matchAll(words)) merge(word, found);
    };
    let done = 0;
    for (const { 0: symbol, index } of symbols ? text.matchAll(symbols) : []) {
      plain(text.slice(done, index));
      found.push(idOf(symbol));
      done = index + symbol.length;
    }
    plain(text.slice(done));
    return found.map((id) => ({ text: texts[id] ?? "", id: id < pieces.length ? id : undefined }));
  };
}

/** normalizer.cc: the longest entry of the map at each place, spaces merged and trimmed, then marked. Symbols of the user stay as they are. */
function normalizerOf({ map, prefix, trims }: Model, symbols: RegExp | undefined): (text: string) => string {
  const { longest } = openCharacterMap(map);
  const replaced = (text: string): string => {
    const bytes = Buffer.from(text);
    let out = "";
    let kept = 0;
    for (let at = 0; at < bytes.length; ) {
      const entry = longest(bytes, at);
      if (entry) {
        out += bytes.toString("utf8", kept, at) + entry.text;
        at += entry.length;
        kept = at;
      } else at += widthAt(bytes[at] ?? 0);
    }
    return out + bytes.toString("utf8", kept);
  };
  const changed = (text: string): string => {
    if (map.length === 0) return text;
    if (!symbols) return replaced(text);
    let out = "";
    let done = 0;
    for (const { 0: symbol, index } of text.matchAll(symbols)) {
      out += replaced(text.slice(done, index)) + symbol;
      done = index + symbol.length;
    }
    return out + replaced(text.slice(done));
  };
  return (text) => {
    const plain = changed(text);
    const spaced = trims ? plain.replace(/ {2,}/g, " ").replace(/^ /, "") : plain;
    if (spaced === "") return "";
    const marked = (prefix ? MARK : "") + spaced.replaceAll(" ", MARK);
    return trims ? marked.replace(/\u2581+$/, "") : marked;
  };
}

const widthAt = (lead: number): number => (lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4);

const otherFile = "name a tokenizer.json, a tokenizer.model or a .tiktoken file; copy a damaged one again";

function readModel(bytes: Uint8Array, path: string): Model {
  const pieces: Piece[] = [];
  const model = { type: 1, byteFallback: false, end: 2, map: new Uint8Array() as Uint8Array, prefix: true, trims: true };
  let [marks, suffix, trained] = [true, false, false];
  const text = (field: Uint8Array): string => Buffer.from(field).toString();
  try {
    for (const { number, bytes: message } of protoFields(bytes)) {
      if (number === 1) {
        const piece = { text: "", id: pieces.length, score: 0, type: types.normal as number };
        for (const { number: field, value, bytes: own } of protoFields(message)) {
          if (field === 1) piece.text = text(own);
          else if (field === 2) piece.score = value;
          else if (field === 3) piece.type = value;
        }
        pieces.push(piece);
      } else if (number === 2)
        for (const { number: field, value } of protoFields(message)) {
          trained = true;
          if (field === 3) model.type = value;
          else if (field === 24) suffix = value !== 0;
          else if (field === 35) model.byteFallback = value !== 0;
          // a negative id has ten bytes on the wire
          else if (field === 42) model.end = value < 2 ** 31 ? value : -1;
        }
      else if (number === 3)
        for (const { number: field, value, bytes: own } of protoFields(message)) {
          if (field === 2) model.map = own;
          else if (field === 3) model.prefix = value !== 0;
          else if (field === 4) model.trims = value !== 0;
          else if (field === 5) marks = value !== 0;
        }
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new Trouble(`${path}: the file is no SentencePiece model, or a damaged one: ${error.message}`, otherFile);
  }
  const refused = [
    model.type !== 1 && model.type !== 2 && `a model of type ${["word", "char"][model.type - 3] ?? model.type}`,
    suffix && "space marks behind words (treat_whitespace_as_suffix)",
    !marks && "spaces without a mark (escape_whitespaces: false)",
    model.type === 2 && pieces.some(({ type }) => type === types.unused) && "unused pieces of BPE",
  ].find((what) => what !== false);
  if (pieces.length === 0 || !trained)
    throw new Trouble(`${path}: the file is no SentencePiece model, or a damaged one: it lacks pieces or settings`, otherFile);
  if (refused !== undefined)
    throw new Trouble(
      `${path}: the tokenizer has ${refused}, which rankc does not compute`,
      "tokenize with sentencepiece, and name the .bin file of the ids",
    );
  return { ...model, pieces };
}
