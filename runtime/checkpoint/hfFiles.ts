/** Opens the files of a Hugging Face checkpoint: one file, or several under an index that names the file of each tensor. */

import { readFileSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { entryOf } from "../../schemas/lookup.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { openSafetensors, type Safetensors } from "./safetensors.ts";
import { checkpointsIn } from "./saveFolder.ts";
import { TEXT } from "./snapshotFile.ts";

/** The open file of each tensor, by tensor name. */
export type Tensors = { readonly where: ReadonlyMap<string, Safetensors>; readonly close: () => void };

const INDEX = "model.safetensors.index.json";

/** Opens a checkpoint and reads the headers of its files. Throws a Trouble if `path` is not a checkpoint. */
export function openTensors(path: string): Tensors {
  const inside = (name: string): string => join(path, name);
  if (statSync(path, { throwIfNoEntry: false })?.isDirectory()) {
    const file = [INDEX, "model.safetensors"].map(inside).find((name) => statSync(name, { throwIfNoEntry: false }) !== undefined);
    if (file === undefined && (statSync(inside(TEXT), { throwIfNoEntry: false }) || checkpointsIn(path).length > 0))
      throw new Trouble(`${path} is a checkpoint of a run, or a folder of them`, `read its weights with --resume ${path} --only weights`);
    if (file === undefined)
      throw new Trouble(`${path}: holds neither ${INDEX} nor model.safetensors`, "name the folder or the file of a safetensors checkpoint");
    return openTensors(file);
  }
  if (path.endsWith(".json")) return openIndex(path);
  const one = openSafetensors(path);
  return { where: new Map(one.names.map((name) => [name, one])), close: one.close };
}

function openIndex(path: string): Tensors {
  const shards = new Map<string, Safetensors>();
  const close = () => {
    for (const shard of shards.values()) shard.close();
  };
  try {
    const where = new Map<string, Safetensors>();
    for (const [tensor, file] of weightMap(path)) {
      if (!shards.has(file)) shards.set(file, openSafetensors(join(dirname(path), file)));
      const shard = entryOf(shards, file, "file");
      shard.info(tensor);
      where.set(tensor, shard);
    }
    return { where, close };
  } catch (error) {
    close();
    throw error;
  }
}

function weightMap(path: string): readonly (readonly [string, string])[] {
  let index: unknown;
  try {
    index = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new Trouble(
      `${path}: cannot be read as a checkpoint index (${error instanceof SyntaxError ? "not JSON" : (error as NodeJS.ErrnoException).code})`,
      "name a checkpoint",
    );
  }
  const map = (index as { weight_map?: unknown } | null)?.weight_map;
  if (typeof map !== "object" || map === null)
    throw new Trouble(`${path}: has no weight_map, which names the file of each tensor`, "download it again");
  const entries = Object.entries(map);
  for (const [tensor, file] of entries) {
    // shards are in the folder of their index; a path that leaves the folder is rejected
    if (typeof file !== "string" || !/^[^/\\]+\.safetensors$/.test(file)) {
      throw new Trouble(
        `${path}: tensor ${tensor} is said to be in ${JSON.stringify(file)}, which is no safetensors file beside it`,
        "download it again",
      );
    }
  }
  return entries;
}

/** Throws a Trouble if weights have scales beside them: their elements alone are not the weights. */
export function expectUnscaled(file: string, { where }: Tensors): void {
  for (const [name, source] of where) {
    const weight = /^(.*\.weight)_scale(_inv)?$/.exec(name)?.[1];
    if (weight === undefined || !where.has(weight)) continue;
    throw new Trouble(
      `${file}: its weights are quantized: ${weight} is ${where.get(weight)?.info(weight).dtype} with scales in ${name} ${JSON.stringify(source.info(name).shape)}`,
      "convert them to bf16 (DeepSeek's repositories have a script for that, fp8_cast_bf16.py), and name the folder of the result",
    );
  }
}

/** Throws a Trouble if the tensor names have a prefix that causal language models do not have. */
export function expectPrefix(file: string, { where }: Tensors): void {
  const names = [...where.keys()];
  if (names.some((name) => name === "embed" || name === "model.embed_tokens.weight")) return;
  const first = names.flatMap(
    (name) => /^((?!.*layers\.).*?)embed_tokens\.weight$|^(.*?)layers\.0\.input_layernorm\.weight$/.exec(name) ?? [],
  );
  const prefix = first[1] ?? first[2];
  if (prefix === undefined || prefix === "model.") return;
  if (prefix === "")
    throw new Trouble(
      `${file}: its tensors are named without the prefix model.: it holds a base model, saved without the head of a language model`,
      "save it with AutoModelForCausalLM: its names begin with model., and lm_head.weight is among them where embeddings are not tied",
    );
  const multimodal = prefix.includes("language_model.");
  throw new Trouble(
    `${file}: its tensors are named ${prefix}… instead of model.…${multimodal ? ": it holds a multimodal model, of which that is the language model" : ""}`,
    multimodal
      ? "save the language model by itself (AutoModelForCausalLM), or rename its tensors and leave the others out"
      : `rename its tensors from ${prefix}… to model.…`,
  );
}
