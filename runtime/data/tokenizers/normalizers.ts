/** Normalizers of tokenizer.json: text → text. The behaviour is that of Hugging Face tokenizers 0.23. */

import { spellBytes } from "./byteLevel.ts";
import { openCharacterMap } from "./characterMap.ts";
import { literally, translatePattern } from "./pattern.ts";
import type { NormalizerConfig, PatternConfig } from "./tokenizerFile.ts";

/** Changes a text before it is split. */
export type Normalizer = (text: string) => string;

/** Returns the pattern of a Split or a Replace. */
export const patternOf = (pattern: PatternConfig): RegExp =>
  "String" in pattern ? new RegExp(literally(pattern.String), "gv") : translatePattern(pattern.Regex, "oniguruma");

/** Returns the normalizer that a file describes. */
export function normalizerOf(config: NormalizerConfig): Normalizer {
  switch (config.type) {
    case "NFC":
    case "NFD":
    case "NFKC":
    case "NFKD": {
      const { type } = config;
      return (text) => text.normalize(type);
    }
    case "Lowercase":
      return lowercase;
    case "Strip": {
      const { strip_left, strip_right } = config;
      return (text) => {
        const begun = strip_left ? text.replace(/^\p{White_Space}+/u, "") : text;
        return strip_right ? begun.replace(/\p{White_Space}+$/u, "") : begun;
      };
    }
    case "StripAccents":
      return (text) => text.replace(/\p{M}/gu, "");
    case "Prepend":
      return (text) => (text === "" ? text : config.prepend + text);
    case "Replace": {
      const [pattern, content] = [patternOf(config.pattern), config.content];
      return (text) => text.replace(pattern, () => content);
    }
    case "BertNormalizer":
      return bert(config);
    case "Precompiled":
      return openCharacterMap(Buffer.from(config.precompiled_charsmap, "base64")).graphemes;
    case "ByteLevel":
      return spellBytes;
    case "Sequence": {
      const parts = config.normalizers.map(normalizerOf);
      return (text) => parts.reduce((changed, part) => part(changed), text);
    }
    default:
      return config satisfies never;
  }
}

/** Each character by itself: a sigma at the end of a word is no special case. */
const lowercase: Normalizer = (text) => {
  const lower = text.toLowerCase();
  return lower.includes("\u03c2") || lower.length !== text.length ? Array.from(text, (c) => c.toLowerCase()).join("") : lower;
};

const CHINESE =
  /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/gu;

function bert({
  clean_text,
  handle_chinese_chars,
  strip_accents,
  lowercase: lowers,
}: Extract<NormalizerConfig, { type: "BertNormalizer" }>): Normalizer {
  return (text) => {
    let out = text;
    if (clean_text) out = out.replace(/(?![\t\n\r])[\ufffd\p{Cc}\p{Cf}\p{Co}]/gu, "").replace(/\p{White_Space}/gu, " ");
    if (handle_chinese_chars) out = out.replace(CHINESE, " $& ");
    if (strip_accents ?? lowers) out = out.normalize("NFD").replace(/\p{Mn}/gu, "");
    return lowers ? lowercase(out) : out;
  };
}
