/** Pre-tokenizers of tokenizer.json: they split a text into words. The behaviour is that of Hugging Face tokenizers 0.23. */
import { spellBytes } from "./byteLevel.ts";
import { patternOf } from "./normalizers.ts";
import { literally, WORD } from "./pattern.ts";
import type { PreTokenizerConfig, SplitBehavior } from "./tokenizerFile.ts";

/** A part of a text. */
export interface TextPart {
  readonly text: string;
  /** Whether it begins the text. */
  readonly first: boolean;
}
/** Splits each part further. */
export type PreTokenizer = (parts: readonly TextPart[]) => TextPart[];

/** GPT-2's encoder.py. */
const GPT2 =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const PUNCTUATION = /[!-/:-@[-`{-~]|\p{P}/gu;

/** Returns the pre-tokenizer that a file describes. */
export function preTokenizerOf(config: PreTokenizerConfig): PreTokenizer {
  switch (config.type) {
    case "ByteLevel": {
      const { add_prefix_space, use_regex } = config;
      const prefixed = (text: string): string => (add_prefix_space && !text.startsWith(" ") ? ` ${text}` : text);
      return (parts) =>
        parts.flatMap(({ text, first }) => split({ text: prefixed(text), first }, use_regex ? GPT2 : undefined, "Isolated").map(spelled));
    }
    case "Split": {
      const [pattern, { behavior, invert }] = [patternOf(config.pattern), config];
      return (parts) => parts.flatMap((part) => split(part, pattern, behavior, invert));
    }
    case "Metaspace":
      return metaspace(config);
    case "Whitespace": {
      const words = new RegExp(`[${WORD}\\u200c\\u200d]+|[^${WORD}\\u200c\\u200d\\p{White_Space}]+`, "gu");
      return (parts) => parts.flatMap((part) => split(part, words, "Removed", true));
    }
    case "WhitespaceSplit":
      return (parts) => parts.flatMap((part) => split(part, /\p{White_Space}/gu, "Removed"));
    case "BertPreTokenizer":
      return (parts) =>
        parts.flatMap((part) => split(part, /\p{White_Space}/gu, "Removed")).flatMap((part) => split(part, PUNCTUATION, "Isolated"));
    case "Punctuation":
      return (parts) => parts.flatMap((part) => split(part, PUNCTUATION, config.behavior));
    case "Digits":
      return (parts) => parts.flatMap((part) => split(part, /\p{N}/gu, config.individual_digits ? "Isolated" : "Contiguous"));
    case "CharDelimiterSplit": {
      const delimiter = new RegExp(literally(config.delimiter), "gv");
      return (parts) => parts.flatMap((part) => split(part, delimiter, "Removed"));
    }
    case "Sequence": {
      const steps = config.pretokenizers.map(preTokenizerOf);
      return (parts) => steps.reduce<TextPart[]>((done, step) => step(done), [...parts]);
    }
    default:
      return config satisfies never;
  }
}

const spelled = ({ text, first }: TextPart): TextPart => ({ text: spellBytes(text), first });

function metaspace(config: Extract<PreTokenizerConfig, { type: "Metaspace" }>): PreTokenizer {
  const { replacement, prepend_scheme = config.add_prefix_space ? "always" : "never" } = config;
  const mark = new RegExp(literally(replacement), "gv");
  return (parts) =>
    parts.flatMap(({ text, first }) => {
      const marked = text.replaceAll(" ", replacement);
      const prepends = prepend_scheme === "always" || (prepend_scheme === "first" && first);
      const whole = { text: prepends && !marked.startsWith(replacement) ? replacement + marked : marked, first };
      return config.split ? split(whole, mark, "MergedWithNext") : [whole];
    });
}

/** Splits a part at the matches of a pattern. `invert`: what lies between the matches is what the behavior is about. */
function split(part: TextPart, pattern: RegExp | undefined, behavior: SplitBehavior, invert = false): TextPart[] {
  const { text, first } = part;
  if (text === "") return [];
  if (pattern === undefined) return [part];
  /** Ends of the pieces; `matched[i]`: piece i is a match. */
  const ends: number[] = [];
  const matched: boolean[] = [];
  let done = 0;
  const add = (end: number, isMatch: boolean): void => {
    if (end > done) {
      ends.push(end);
      matched.push(isMatch !== invert);
    }
    done = end;
  };
  pattern.lastIndex = 0;
  for (let found = pattern.exec(text); found; found = pattern.exec(text)) {
    const [whole] = found;
    if (whole === "") {
      pattern.lastIndex += (text.codePointAt(pattern.lastIndex) ?? 0) > 0xffff ? 2 : 1;
      continue;
    }
    add(found.index, false);
    add(found.index + whole.length, true);
  }
  add(text.length, false);
  const parts: TextPart[] = [];
  let begin = 0;
  for (const [i, end] of ends.entries()) {
    if (i + 1 < ends.length && joins(behavior, matched, i)) continue;
    if (!(behavior === "Removed" && matched[i])) parts.push({ text: text.slice(begin, end), first: first && begin === 0 });
    begin = end;
  }
  return parts;
}

/** Whether piece i and the next are one. */
function joins(behavior: SplitBehavior, matched: readonly boolean[], i: number): boolean {
  const [here, next] = [matched[i] === true, matched[i + 1] === true];
  switch (behavior) {
    case "Contiguous":
      return here === next;
    case "MergedWithPrevious":
      return !here && next;
    case "MergedWithNext":
      return here && !next;
    default:
      return false;
  }
}
