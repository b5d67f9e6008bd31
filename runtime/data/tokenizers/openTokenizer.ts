/** Opens the tokenizer that a job or a command names. */
import { dirname, join } from "node:path";
import { Trouble } from "../../../schemas/trouble.ts";
import { isFolder, isThere, readWhole } from "../inputFile.ts";
import { huggingFaceTokenizer } from "./huggingFace.ts";
import { sentencePieceTokenizer } from "./sentencePiece.ts";
import { encodingNames, isTiktoken, tiktokenTokenizer } from "./tiktoken.ts";
import { bytesTokenizer, type Tokenizer } from "./tokenizer.ts";

const WHAT = "the tokenizer";

/**
 * Opens a tokenizer: `bytes`, a tokenizer.json, a tokenizer.model, a file of tiktoken, or a folder with one of the first two. The content
 * decides the kind. `encoding`: of tiktoken; default: the one that the name of the file has. Throws a Trouble that names the file.
 */
export function openTokenizer(path: string, encoding?: string): Tokenizer {
  if (path === "bytes") return bytesTokenizer;
  const file = isFolder(path) ? inFolder(path) : path;
  const bytes = readWhole(file, WHAT);
  const head = Buffer.from(bytes.subarray(0, 4096)).toString("latin1");
  if (/^(\u00ef\u00bb\u00bf)?\s*\{/.test(head)) return huggingFaceTokenizer(parseJson(bytes, file), file, endTokenBeside(file));
  if (isTiktoken(head)) return tiktokenTokenizer(Buffer.from(bytes).toString(), file, encoding ?? encodingOf(file));
  return sentencePieceTokenizer(bytes, file);
}

function inFolder(folder: string): string {
  const found = ["tokenizer.json", "tokenizer.model"].map((name) => join(folder, name)).find(isThere);
  if (found !== undefined) return found;
  throw new Trouble(`${folder}: the folder has neither tokenizer.json nor tokenizer.model`, "name the file of the tokenizer");
}

function parseJson(bytes: Uint8Array, path: string): unknown {
  try {
    return JSON.parse(
      Buffer.from(bytes)
        .toString()
        .replace(/^\ufeff/, ""),
    );
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new Trouble(`${path}: the tokenizer is no valid JSON: ${why}`, "copy the file again");
  }
}

/** The eos_token of tokenizer_config.json in the same folder: a text, or a token with its content. */
function endTokenBeside(file: string): string | undefined {
  const path = join(dirname(file), "tokenizer_config.json");
  if (!isThere(path)) return undefined;
  const config = parseJson(readWhole(path, "the configuration of the tokenizer"), path);
  const token = typeof config === "object" && config !== null && "eos_token" in config ? config.eos_token : undefined;
  if (typeof token === "object" && token !== null && "content" in token && typeof token.content === "string") return token.content;
  return typeof token === "string" ? token : undefined;
}

function encodingOf(file: string): string {
  const found = encodingNames.find((name) => file.includes(name));
  if (found !== undefined) return found;
  throw new Trouble(
    `${file}: the tokenizer is a file of tiktoken, which does not say where words end`,
    `put the name of its encoding into the name of the file, or after --encoding: ${encodingNames.join(", ")}`,
  );
}
