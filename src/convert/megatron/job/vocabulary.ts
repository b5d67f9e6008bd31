/** The rows of the embedding: the size of the tokenizer, up to a multiple that depends on the tensor degree. */
import type { Importing } from "./importing.ts";

/** Sizes with added tokens, of tokenizers by their name on the Hugging Face hub: a text that the name contains, in lower case. */
const hubSizes: readonly (readonly [name: string, size: number])[] = [
  ["deepseek-v3", 128815],
  ["deepseek-r1", 128815],
  ["deepseek-v2", 100002],
  ["qwen3", 151669],
  ["qwen2.5", 151665],
  ["qwen2", 151646],
  ["qwen1.5", 151646],
  ["moonlight", 163840],
  ["kimi-k2", 163840],
  ["llama-3", 128256],
  ["llama-2", 32000],
  ["mixtral-8x", 32000],
  ["mistral-7b-v0.1", 32000],
  ["olmoe", 50280],
  ["gpt2", 50257],
];

/** Sizes of tokenizers that have one vocabulary. Llama2Tokenizer reads a file, which is nearly always that of Llama 2. */
const typeSizes: Readonly<Record<string, number>> = { Llama2Tokenizer: 32000, GPT2BPETokenizer: 50257 };

/** The tokenizer of `pretrain_gpt.py` without --tokenizer-type. */
const DEFAULT_TYPE = "GPT2BPETokenizer";

interface Size {
  readonly size: number;
  readonly of: string;
}

/** Returns the size of the tokenizer and its source; undefined if the user must give it. */
function sizeOf({ args }: Importing, asked: number | undefined): Size | undefined {
  const given = args.numberIfGiven("vocab-size");
  const extra = args.numberIfGiven("extra-vocab-size") ?? 0;
  const patched = args.textIfGiven("patch-tokenizer-type");
  const type = patched ?? args.textIfGiven("tokenizer-type") ?? DEFAULT_TYPE;
  if (asked !== undefined) return { size: asked + extra, of: "--vocab" };
  const own = Object.hasOwn(typeSizes, type) ? typeSizes[type] : undefined;
  if (type === "HuggingFaceTokenizer") {
    // the path of a local folder may end in the name on the hub
    const model = args.textIfGiven("tokenizer-model")?.toLowerCase() ?? "";
    const known = hubSizes.find(([name]) => model.includes(name));
    if (known) return { size: known[1] + extra, of: args.textIfGiven("tokenizer-model") ?? type };
  }
  if (own !== undefined && (args.has("tokenizer-type") || given === undefined)) return { size: own + extra, of: type };
  return given === undefined ? undefined : { size: given + extra, of: "--vocab-size" };
}

/** Puts model.vocab and model.vocab_multiple. `asked`: the size of the tokenizer that the user gives. */
export function putVocabulary({ args, job }: Importing, tensor: number, asked: number | undefined): void {
  const padded = args.numberIfGiven("padded-vocab-size");
  if (padded !== undefined) {
    job.put("model.vocab", padded, ["padded-vocab-size"]);
    return;
  }
  const found = sizeOf({ args, job }, asked);
  if (!found) {
    const tokenizer = ["patch-tokenizer-type", "tokenizer-type", "tokenizer-model"] as const;
    const subject = tokenizer.flatMap((name) => args.given.get(name)?.shown ?? []).join(" ");
    job.reject(subject, "the size of its vocabulary is not known here", "--vocab N gives the number of tokens, added ones included");
    return;
  }
  const divisor = args.number("make-vocab-size-divisible-by");
  const multiple = divisor * tensor;
  const remark = found.of === "--vocab-size" ? undefined : `of ${found.of}`;
  job.put(
    "model.vocab",
    found.size,
    ["tokenizer-type", "tokenizer-model", "vocab-size", "extra-vocab-size", "patch-tokenizer-type"],
    remark,
  );
  if (found.size % multiple !== 0)
    job.put("model.vocab_multiple", multiple, ["make-vocab-size-divisible-by"], `${divisor} times the tensor size ${tensor}`);
}
