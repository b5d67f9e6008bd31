/** The files of a tokenizer, as Hugging Face reads them beside a model. */
import { existsSync, readFileSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";

const names = [
  ...["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"],
  ...["tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tiktoken.model"],
];

/** The files of a tokenizer: paths to copy, texts to write, and the ids of special tokens. */
export interface TokenizerFiles {
  readonly copies: Readonly<Record<string, string>>;
  readonly texts: Readonly<Record<string, string>>;
  readonly ids: Readonly<Record<string, number>>;
}

/** Finds the files beside `path`, a file of a tokenizer or its folder. Returns undefined if there is none. */
export function tokenizerFiles(path: string): TokenizerFiles | undefined {
  const isFolder = statSync(path, { throwIfNoEntry: false })?.isDirectory() ?? false;
  const folder = isFolder ? path : dirname(path);
  const found = names.filter((name) => existsSync(join(folder, name)));
  const own = isFolder || found.includes(basename(path)) || !existsSync(path) ? [] : [basename(path)];
  if (found.length + own.length === 0 || !existsSync(path)) return undefined;
  const copies = Object.fromEntries([...found, ...own].map((name) => [name, join(folder, name)]));
  const config = readJson(copies["tokenizer_config.json"]);
  const texts =
    "tokenizer.json" in copies && !config
      ? { "tokenizer_config.json": `${JSON.stringify({ tokenizer_class: "PreTrainedTokenizerFast" }, null, 2)}\n` }
      : {};
  return { copies, texts, ids: specialIds(config, readJson(copies["tokenizer.json"])) };
}

/** Returns the ids of the tokens that tokenizer_config.json names. */
function specialIds(config: object | undefined, tokenizer: object | undefined): Record<string, number> {
  const added = (tokenizer as { added_tokens?: readonly { id: number; content: string }[] } | undefined)?.added_tokens ?? [];
  return Object.fromEntries(
    ["bos_token", "eos_token", "pad_token"].flatMap((key) => {
      const token = (config as Record<string, unknown> | undefined)?.[key];
      const text = typeof token === "object" && token !== null ? (token as { content?: unknown }).content : token;
      const id = added.find(({ content }) => content === text)?.id;
      return id === undefined ? [] : [[`${key}_id`, id]];
    }),
  );
}

function readJson(path: string | undefined): object | undefined {
  if (path === undefined) return undefined;
  try {
    const value: unknown = JSON.parse(readFileSync(path, "utf8"));
    return typeof value === "object" && value !== null ? value : undefined;
  } catch {
    // a file that is not JSON is copied as it is
    return undefined;
  }
}
