/** Tokenizers of Hugging Face's tokenizer.json: added tokens, normalizer, pre-tokenizer, model. */
import { cutterOf } from "./addedTokens.ts";
import { decodeBytes, decodePieces, decodeWords, type TokensDecoder } from "./decoders.ts";
import { modelOf } from "./models.ts";
import { type Normalizer, normalizerOf } from "./normalizers.ts";
import { type PreTokenizer, preTokenizerOf } from "./preTokenizers.ts";
import type { Tokenizer } from "./tokenizer.ts";
import { parseTokenizerFile, type TokenizerFile } from "./tokenizerFile.ts";
import { cached } from "./wordCache.ts";

/** Opens the content of a tokenizer.json. `endToken`: the end of a document by tokenizer_config.json. Throws a Trouble. */
export function huggingFaceTokenizer(content: unknown, path: string, endToken?: string): Tokenizer {
  const file = parseTokenizerFile(content, path);
  const { model, vocab } = modelOf(file.model, path);
  const normalize: Normalizer = file.normalizer ? normalizerOf(file.normalizer) : (text) => text;
  const preTokenize: PreTokenizer = file.pre_tokenizer ? preTokenizerOf(file.pre_tokenizer) : wholeOrWords(file);
  const cutRaw = cutterOf(file.added_tokens.filter(({ normalized }) => !normalized).map((token) => ({ ...token, pattern: token.content })));
  const cutNormal = cutterOf(
    file.added_tokens.filter(({ normalized }) => normalized).map((token) => ({ ...token, pattern: normalize(token.content) })),
  );
  const ids = new Map([...vocab, ...file.added_tokens.map(({ content, id }): [string, number] => [content, id])]);
  const tokens = new Map(Array.from(ids, ([token, id]) => [id, token]));
  const added = new Set(file.added_tokens.map(({ id }) => id));
  const encodeWord = cached(model);
  const decodeTokens = decoderOf(file);
  return {
    kind: file.model.type,
    vocab: 1 + Array.from(tokens.keys()).reduce((most, id) => Math.max(most, id), -1),
    encode: (text, into) => {
      for (const section of cutRaw(text)) {
        if ("id" in section) {
          into.push(section.id);
          continue;
        }
        for (const part of cutNormal(normalize(section.text))) {
          if ("id" in part) into.push(part.id);
          else if (part.text !== "")
            for (const word of preTokenize([{ text: part.text, first: section.at === 0 && part.at === 0 }]))
              if (word.text !== "") encodeWord(word.text, into);
        }
      }
    },
    decode: (all) => {
      let out = "";
      let run: string[] = [];
      for (const id of all) {
        if (!added.has(id)) run.push(tokens.get(id) ?? "\ufffd");
        else {
          out += decodeTokens(run) + (tokens.get(id) ?? "");
          run = [];
        }
      }
      return out + decodeTokens(run);
    },
    idOf: (token) => ids.get(token),
    end: endToken === undefined ? undefined : ids.get(endToken),
  };
}

/**
 * Without a pre-tokenizer the whole text is one word, and no word repeats. Merges never cross a border between another character and a
 * space mark if no token has a mark behind another character: there a text may be cut. The mark must be a token, or it would fuse with
 * unknown characters.
 */
function wholeOrWords({ model }: TokenizerFile): PreTokenizer {
  if (model.type !== "BPE" || model.vocab["\u2581"] === undefined || model.ignore_merges) return (parts) => [...parts];
  if (Object.keys(model.vocab).some((token) => /[^\u2581]\u2581/u.test(token))) return (parts) => [...parts];
  if (model.continuing_subword_prefix || model.end_of_word_suffix) return (parts) => [...parts];
  return (parts) =>
    parts.flatMap(({ text, first }) => (text.match(/\u2581*[^\u2581]+|\u2581+/gu) ?? []).map((word) => ({ text: word, first })));
}

function decoderOf({ model, pre_tokenizer, decoder }: TokenizerFile): TokensDecoder {
  const isByteLevel = [pre_tokenizer, decoder].some((part) => JSON.stringify(part ?? null).includes('"ByteLevel"'));
  if (isByteLevel && !(model.type === "BPE" && model.end_of_word_suffix)) return decodeBytes;
  if (model.type === "WordPiece") return decodeWords(model.continuing_subword_prefix, "");
  if (model.type === "WordLevel") return (tokens) => tokens.join(" ");
  if (model.type === "BPE" && model.end_of_word_suffix) return decodeWords("", model.end_of_word_suffix);
  return decodePieces;
}
