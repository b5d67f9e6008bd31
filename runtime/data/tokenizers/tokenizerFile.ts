/** The schema of Hugging Face's tokenizer.json: the components that rankc computes. Any other is refused by its name. */
import { z } from "zod";
import { Trouble } from "../../../schemas/trouble.ts";

const PatternConfig = z.union([z.object({ String: z.string() }), z.object({ Regex: z.string() })]);
/** A text or a regular expression. */
export type PatternConfig = z.output<typeof PatternConfig>;

const flag = (otherwise: boolean) => z.boolean().default(otherwise);
const behaviors = ["Removed", "Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext"] as const;
/** What becomes of the matches of a split. */
export type SplitBehavior = (typeof behaviors)[number];
const Behavior = z.enum(behaviors);

/** A normalizer of the file. */
export type NormalizerConfig =
  | { readonly type: "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents" | "ByteLevel" }
  | { readonly type: "Strip"; readonly strip_left: boolean; readonly strip_right: boolean }
  | { readonly type: "Prepend"; readonly prepend: string }
  | { readonly type: "Replace"; readonly pattern: PatternConfig; readonly content: string }
  | {
      readonly type: "BertNormalizer";
      readonly clean_text: boolean;
      readonly handle_chinese_chars: boolean;
      readonly strip_accents: boolean | null;
      readonly lowercase: boolean;
    }
  | { readonly type: "Precompiled"; readonly precompiled_charsmap: string }
  | { readonly type: "Sequence"; readonly normalizers: readonly NormalizerConfig[] };
const named = <T extends string>(type: T) => z.object({ type: z.literal(type) });
const NormalizerConfig: z.ZodType<NormalizerConfig> = z.lazy(() =>
  z.discriminatedUnion("type", [
    z.object({ type: z.enum(["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "ByteLevel"]) }),
    named("Strip").extend({ strip_left: flag(true), strip_right: flag(true) }),
    named("Prepend").extend({ prepend: z.string() }),
    named("Replace").extend({ pattern: PatternConfig, content: z.string() }),
    named("BertNormalizer").extend({
      ...{ clean_text: flag(true), handle_chinese_chars: flag(true), lowercase: flag(true) },
      strip_accents: z.boolean().nullable().default(null),
    }),
    named("Precompiled").extend({ precompiled_charsmap: z.string() }),
    named("Sequence").extend({ normalizers: z.array(NormalizerConfig) }),
  ]),
);

/** A pre-tokenizer of the file. */
export type PreTokenizerConfig =
  | { readonly type: "ByteLevel"; readonly add_prefix_space: boolean; readonly use_regex: boolean }
  | { readonly type: "Split"; readonly pattern: PatternConfig; readonly behavior: SplitBehavior; readonly invert: boolean }
  | {
      readonly type: "Metaspace";
      readonly replacement: string;
      readonly prepend_scheme: "always" | "first" | "never" | undefined;
      readonly add_prefix_space: boolean;
      readonly split: boolean;
    }
  | { readonly type: "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer" }
  | { readonly type: "Punctuation"; readonly behavior: SplitBehavior }
  | { readonly type: "Digits"; readonly individual_digits: boolean }
  | { readonly type: "CharDelimiterSplit"; readonly delimiter: string }
  | { readonly type: "Sequence"; readonly pretokenizers: readonly PreTokenizerConfig[] };
const PreTokenizerConfig: z.ZodType<PreTokenizerConfig> = z.lazy(() =>
  z.discriminatedUnion("type", [
    named("ByteLevel").extend({ add_prefix_space: flag(true), use_regex: flag(true) }),
    named("Split").extend({ pattern: PatternConfig, behavior: Behavior, invert: flag(false) }),
    named("Metaspace").extend({
      replacement: z.string().default("\u2581"),
      prepend_scheme: z.union([z.enum(["always", "first", "never"]), z.undefined()]),
      ...{ add_prefix_space: flag(true), split: flag(true) },
    }),
    z.object({ type: z.enum(["Whitespace", "WhitespaceSplit", "BertPreTokenizer"]) }),
    named("Punctuation").extend({ behavior: Behavior.default("Isolated") }),
    named("Digits").extend({ individual_digits: flag(false) }),
    named("CharDelimiterSplit").extend({ delimiter: z.string() }),
    named("Sequence").extend({ pretokenizers: z.array(PreTokenizerConfig) }),
  ]),
);

const Ids = z.record(z.string(), z.int().min(0));
const optionalText = z.string().nullable().default(null);
const BpeConfig = named("BPE").extend({
  vocab: Ids,
  merges: z.array(z.union([z.string(), z.tuple([z.string(), z.string()])])),
  ...{ unk_token: optionalText, continuing_subword_prefix: optionalText, end_of_word_suffix: optionalText },
  ...{ fuse_unk: flag(false), byte_fallback: flag(false), ignore_merges: flag(false) },
  dropout: z.number().nullable().default(null),
});
/** Byte-pair encoding. */
export type BpeConfig = z.output<typeof BpeConfig>;
const UnigramConfig = named("Unigram").extend({
  vocab: z.array(z.tuple([z.string(), z.number()])),
  unk_id: z.int().min(0).nullable().default(null),
  byte_fallback: flag(false),
});
/** A language model of single pieces. */
export type UnigramConfig = z.output<typeof UnigramConfig>;
const WordPieceConfig = named("WordPiece").extend({
  ...{ vocab: Ids, unk_token: z.string(), continuing_subword_prefix: z.string().default("##") },
  max_input_chars_per_word: z.int().default(100),
});
/** The longest known piece first. */
export type WordPieceConfig = z.output<typeof WordPieceConfig>;
const WordLevelConfig = named("WordLevel").extend({ vocab: Ids, unk_token: z.string() });
const ModelConfig = z.discriminatedUnion("type", [BpeConfig, UnigramConfig, WordPieceConfig, WordLevelConfig]);
/** The model of a tokenizer: words → ids. */
export type ModelConfig = z.output<typeof ModelConfig>;

const AddedTokenConfig = z.object({
  ...{ id: z.int().min(0), content: z.string() },
  ...{ single_word: flag(false), lstrip: flag(false), rstrip: flag(false), normalized: flag(true), special: flag(false) },
});
/** A token that is found in the text before the model sees it. */
export type AddedTokenConfig = z.output<typeof AddedTokenConfig>;

const TokenizerFile = z.object({
  added_tokens: z.array(AddedTokenConfig).default([]),
  normalizer: NormalizerConfig.nullable().default(null),
  pre_tokenizer: PreTokenizerConfig.nullable().default(null),
  model: ModelConfig,
  decoder: z.unknown(),
});
/** The content of tokenizer.json. */
export type TokenizerFile = z.output<typeof TokenizerFile>;

const known = {
  normalizer: "NFC NFD NFKC NFKD Lowercase Strip StripAccents Prepend Replace BertNormalizer Precompiled ByteLevel Sequence",
  pre_tokenizer: "ByteLevel Split Metaspace Whitespace WhitespaceSplit BertPreTokenizer Punctuation Digits CharDelimiterSplit Sequence",
  model: "BPE Unigram WordPiece WordLevel",
} as const;
const otherWay = "tokenize with the tokenizer's own library, and name the .bin file of the ids";

/** Reads the content of a tokenizer.json. Throws a Trouble that names the place and a component that rankc does not compute. */
export function parseTokenizerFile(value: unknown, path: string): TokenizerFile {
  const text = withModelType(value);
  for (const [part, names] of Object.entries(known))
    for (const type of typesIn(isObject(text) ? text[part] : undefined))
      if (!names.split(" ").includes(type))
        throw new Trouble(`${path}: rankc has no ${part} ${type}; it has ${names.replaceAll(" ", ", ")}`, otherWay);
  const parsed = TokenizerFile.safeParse(text);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new Trouble(
      `${path}: ${issue?.path.join(".") || "the file"}: ${issue?.message ?? "is no tokenizer"}`,
      "name a tokenizer.json of Hugging Face tokenizers",
    );
  }
  const { model, normalizer, pre_tokenizer } = parsed.data;
  // which part is the first goes by offsets into the text before normalization, which rankc does not follow
  const removes = /"(Strip|StripAccents|BertNormalizer|Precompiled)"/.test(JSON.stringify(normalizer));
  const isBehind = pre_tokenizer?.type === "Sequence" && normalizer !== null && pre_tokenizer.pretokenizers[0]?.type !== "Metaspace";
  if (JSON.stringify(pre_tokenizer).includes('"prepend_scheme":"first"') && (removes || isBehind))
    throw new Trouble(
      `${path}: Metaspace has prepend_scheme first, behind ${removes ? "a normalizer that removes characters" : "another pre-tokenizer"}`,
      otherWay,
    );
  if (model.type === "BPE" && model.dropout)
    throw new Trouble(`${path}: model.dropout ${model.dropout} makes ids random`, "set it to null in a copy of the file");
  return parsed.data;
}

const isObject = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null && !Array.isArray(value);

/** Files of older versions leave out the type of the model. */
function withModelType(value: unknown): unknown {
  if (!isObject(value) || !isObject(value.model) || value.model.type !== undefined) return value;
  const { model } = value;
  const type = Array.isArray(model.vocab)
    ? "Unigram"
    : "merges" in model
      ? "BPE"
      : "max_input_chars_per_word" in model
        ? "WordPiece"
        : "WordLevel";
  return { ...value, model: { type, ...model } };
}

/** The types of a component and of its parts. */
function typesIn(component: unknown): string[] {
  if (!isObject(component)) return [];
  const parts = [component.normalizers, component.pretokenizers].flatMap((list) => (Array.isArray(list) ? list : []));
  return [...(typeof component.type === "string" ? [component.type] : []), ...parts.flatMap(typesIn)];
}
