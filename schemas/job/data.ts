/** The section data: the corpus. */
import { z } from "zod";

const SourceText = z.strictObject({
  path: z.string().min(1).describe("the prefix of the data set, PREFIX of PREFIX.bin and PREFIX.idx, relative to the job file"),
  weight: z.number().min(1e-6).max(1e9).default(1).describe("share of the samples from this source, relative to the other weights"),
});

const DocumentsText = z.strictObject({
  mask: z.boolean().default(true).describe("a token attends to tokens of its own document (reset-attention-mask of Megatron-LM)"),
  positions: z.boolean().default(true).describe("positions begin at 0 in each document (reset-position-ids)"),
  loss: z
    .boolean()
    .default(true)
    .describe(
      "the first token of a document is not predicted from the document before it (eod-mask-loss); depths of mtp cross no border either",
    ),
  end: z
    .int()
    .min(0)
    .nullable()
    .default(null)
    .describe("the token id that ends a document, as its last token; null = the one in PREFIX.json, which rankc data prepare writes"),
});

/** data as written. */
export const DataText = z.strictObject({
  path: z.string().optional().describe("the file of the training text or of its token ids, relative to the job file; excludes sources"),
  sources: z
    .array(SourceText)
    .min(1)
    .optional()
    .describe(
      "in place of path: data sets in Megatron's indexed format, blended by weight. As in Megatron Core, documents are shuffled in each epoch, samples cross the ends of documents, and samples are shuffled; rankc data prepare writes such data sets",
    ),
  split: z
    .array(z.number().min(0).max(1e9))
    .min(1)
    .max(3)
    .optional()
    .describe(
      "shares of training, validation and test, such as [99990, 8, 2]: of the documents of each source in their order, or of the tokens of path. train.evaluation reads the second and the third share",
    ),
  validation: z
    .array(SourceText)
    .min(1)
    .optional()
    .describe("data sets that train.evaluation reads, in place of the second share of split; the same form as sources"),
  test: z.array(SourceText).min(1).optional().describe("the same for the third share of split, which is evaluated at the end"),
  format: z
    .enum(["text", "tokens"])
    .optional()
    .describe("content of path. text: a text; tokens: token ids, one after another; default: tokens if path ends in .bin, otherwise text"),
  dtype: z
    .enum(["u16", "u32"])
    .optional()
    .describe(
      "format tokens: the type of an id, little-endian; default: u16 if it holds all ids below model.vocab, otherwise u32. The index of a Megatron data set, PREFIX.idx beside PREFIX.bin, takes precedence",
    ),
  labels: z
    .string()
    .nullable()
    .default(null)
    .describe(
      "a file with a little-endian i32 for each token of path: the id to predict at the position of that token (usually the token itself), or -100 for a position that is ignored; null = every token is predicted",
    ),
  documents: DocumentsText.optional().describe(
    "documents that share a sequence are kept apart: {} does all that follows; absent: they are one text",
  ),
  tokenizer: z
    .string()
    .min(1)
    .default("bytes")
    .describe(
      "format text. bytes: each byte of the text is one token id, 0 to 255; otherwise a path relative to the job file: tokenizer.json, tokenizer.model of SentencePiece, or a file of tiktoken. A run tokenizes the whole text when it opens it; rankc data prepare is for longer texts",
    ),
  order: z
    .enum(["sequential", "shuffled"])
    .default("sequential")
    .describe("order of sequences. sequential: from the start of the corpus; shuffled: from seeded random positions"),
});

/** data with every default filled in. */
export const Data = DataText.required({ path: true, format: true, dtype: true });
/** Fills in defaults that depend on other keys. `vocab`: model.vocab. */
export function completeData(data: z.output<typeof DataText>, vocab: number): z.output<typeof Data> {
  // the first source represents all of them where one path is shown
  const path = data.path ?? data.sources?.[0]?.path ?? "";
  return {
    ...data,
    path,
    format: data.format ?? (data.sources || path.endsWith(".bin") ? "tokens" : "text"),
    dtype: data.dtype ?? (vocab <= 2 ** 16 ? "u16" : "u32"),
  };
}
