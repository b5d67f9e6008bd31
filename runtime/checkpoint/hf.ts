/**
 * Checkpoints: Hugging Face tensors to our parameters and back. Reading walks the blocks of hfLayout.ts one way, writing the other.
 * Opening reads headers alone and reports everything that does not fit the job at once.
 */

import type { Job } from "../../schemas/job.ts";
import { entryOf } from "../../schemas/lookup.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import type { Ranges } from "../shards.ts";
import { expectFinite } from "./finite.ts";
import { expectPrefix, expectUnscaled, openTensors, type Tensors } from "./hfFiles.ts";
import { type HfParameter, paddedSizesOf, parametersOf, product, sizesOf, type TensorSlice } from "./hfLayout.ts";
import { isConvertible } from "./loadWeights.ts";
import { expectAllowed, keyOfTensor, type Mismatch, surplusMismatches } from "./mismatch.ts";
import { type FilePiece, piecesOf } from "./pieces.ts";
import type { TensorEntry } from "./safetensors.ts";

type Model = Job["model"];

/** An open Hugging Face checkpoint that matches a model. */
export type HfCheckpoint = {
  /** Reads the parameter of this name; `shape` is its whole shape. */
  readonly read: (name: string, shape: readonly number[]) => Float32Array;
  /** Returns where a shard of a parameter is in the files; undefined if only the host converts one of its tensors. */
  readonly pieces: (name: string, sizes: readonly number[], ranges: Ranges) => readonly FilePiece[] | undefined;
  /** Tensors of the file that no parameter of the job reads. */
  readonly unused: readonly string[];
  /** Messages about unused tensors. */
  readonly notes: readonly string[];
  readonly close: () => void;
};

/**
 * `file`: a .safetensors file, an index.json over several, or a folder that holds either under its usual name. `allowed`: the job keys or
 * names of tensors (--allow-mismatch) whose differences the person means. Throws a Trouble that lists all others.
 */
export function checkpointFor(model: Model, file: string, allowed: readonly string[] = []): HfCheckpoint {
  const tensors = openTensors(file);
  try {
    return fitted(model, file, tensors, allowed);
  } catch (error) {
    tensors.close();
    throw error;
  }
}

function fitted(model: Model, file: string, tensors: Tensors, allowed: readonly string[]): HfCheckpoint {
  expectPrefix(file, tensors);
  expectUnscaled(file, tensors);
  const found = new Map<string, { parameter: HfParameter; parts: readonly TensorSlice[] }>();
  const used = new Set<string>();
  const problems = new Set<string>();
  for (const parameter of parametersOf(model)) {
    // The first tensor of a layout identifies it; if no layout matches, the error names the first tensor of the first layout.
    const [newest = parameter.own] = parameter.theirs;
    const there = [parameter.own, ...parameter.theirs].find(([first]) => first !== undefined && tensors.where.has(first.tensor));
    if (!there && parameter.optional) {
      found.set(parameter.name, { parameter, parts: [] });
      continue;
    }
    const parts = there ?? newest;
    found.set(parameter.name, { parameter, parts });
    for (const part of parts) {
      used.add(part.tensor);
      const problem = misfit(part, parameter, tensors, there !== undefined);
      if (problem !== undefined) problems.add(problem);
    }
  }
  const surplus = surplusOf(tensors, used, model);
  const notes = expectAllowed(
    file,
    [...[...problems].map((text) => ({ text })), ...surplus.mismatches],
    allowed,
    "make the model section of the job describe this checkpoint, or name another checkpoint",
  );
  return {
    read: (name, shape) => {
      const known = found.get(name);
      if (known === undefined) throw new Error(`the model has no parameter ${name}`);
      const { parameter, parts } = known;
      const sizes = paddedSizesOf(parameter.shape);
      if (`${sizes}` !== `${shape}`) throw new Error(`${name} has shape ${list(sizes)}, asked for ${list(shape)}`);
      const isPadded = parts === parameter.own || !isShorter(parameter);
      const out = new Float32Array(isPadded ? elementsOf(sizes) : product(parameter.shape));
      for (const { tensor, blocks } of parts) {
        const source = entryOf(tensors.where, tensor, "tensor");
        const data = expectFinite(source.read(tensor), `${source.path}: ${tensor}`, "name a checkpoint whose weights are finite");
        for (const block of blocks) transpose(block.rows, block.cols, data, block.there, out, block.here);
      }
      return isPadded ? out : resized(out, sizesOf(parameter.shape), sizes);
    },
    pieces: (name, sizes, ranges) => {
      const { parameter, parts } = entryOf(found, name, "parameter");
      if (parts !== parameter.own && isShorter(parameter)) return undefined;
      const all = parts.map(({ tensor }) => {
        const source = entryOf(tensors.where, tensor, "tensor");
        const { dtype, start } = source.info(tensor);
        return { path: source.path, name: tensor, dtype, start };
      });
      if (!all.every(({ dtype }) => isConvertible(dtype))) return undefined;
      const places = new Map(all.map((place) => [place.name, place]));
      return piecesOf(parts, sizes, ranges, (tensor) => entryOf(places, tensor, "tensor"));
    },
    unused: [...tensors.where.keys()].filter((name) => !used.has(name)),
    notes: [...surplus.notes, ...notes],
    close: tensors.close,
  };
}

/**
 * These values under the names that transformers 5 has for them while a model runs, experts fused; parameters, gradients and moments
 * alike. State, which has no gradient, is left out where it is not given. Sorted by name.
 */
export function toHuggingFace(
  model: Model,
  named: { get(name: string): { readonly shape: readonly number[]; readonly data: Float32Array } | undefined },
): readonly TensorEntry[] {
  const entries = new Map<string, TensorEntry>();
  for (const { name, shape, own, theirs, optional } of parametersOf(model)) {
    const value = named.get(name);
    if (value === undefined && optional) continue;
    if (value === undefined) throw new Error(`no value for ${name}`);
    const sizes = paddedSizesOf(shape);
    if (value.data.length !== elementsOf(sizes)) throw new Error(`${name} has ${value.data.length} values for shape ${list(sizes)}`);
    const data = resized(value.data, sizes, sizesOf(shape));
    const [newest = own] = theirs;
    for (const part of newest) {
      const entry = entries.get(part.tensor) ?? {
        name: part.tensor,
        dtype: "F32",
        shape: sizesOf(part.shape),
        data: new Float32Array(product(part.shape)),
      };
      entries.set(part.tensor, entry);
      for (const block of part.blocks) transpose(block.cols, block.rows, data, block.here, entry.data, block.there);
    }
  }
  return [...entries.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** Returns whether our parameter has more elements than the tensors of Hugging Face: rows of a vocabulary that no id has. */
const isShorter = ({ shape }: HfParameter): boolean => shape.some(({ size, padded = size }) => padded !== size);

/** Returns the values of a tensor of one or two dims in a tensor of other sizes: further elements are zeros, or left out. */
function resized(data: Float32Array, from: readonly number[], to: readonly number[]): Float32Array {
  if (`${from}` === `${to}`) return data;
  const [rows = 1, columns = 1] = from;
  const [toRows = 1, toColumns = 1] = to;
  const out = new Float32Array(elementsOf(to));
  const width = Math.min(columns, toColumns);
  for (let r = 0; r < Math.min(rows, toRows); r++) out.set(data.subarray(r * columns, r * columns + width), r * toColumns);
  return out;
}

/** Transposes: to[c, r] = from[r, c]. */
function transpose(rows: number, cols: number, from: Float32Array, fromAt: number, to: Float32Array, toAt: number): void {
  if (rows === 1) {
    to.set(from.subarray(fromAt, fromAt + cols), toAt);
    return;
  }
  for (let r = 0; r < rows; r++) {
    const line = fromAt + r * cols;
    for (let c = 0; c < cols; c++) to[toAt + c * rows + r] = from[line + c]!;
  }
}

function misfit(part: TensorSlice, { name, missing }: HfParameter, { where }: Tensors, layoutFound: boolean): string | undefined {
  const source = where.get(part.tensor);
  const expected = list(sizesOf(part.shape));
  if (source === undefined) {
    const layer = /^model\.layers\.\d+\./.exec(part.tensor)?.[0];
    const wholeLayer = layer !== undefined && ![...where.keys()].some((name) => name.startsWith(layer));
    // the layout was identified by its first expert; this expert is missing
    const doubt = layoutFound ? "model.moe.experts" : wholeLayer ? (name.startsWith("mtp.") ? "model.mtp" : "model.layers") : missing;
    return `${part.tensor} is missing; expected ${expected} (check ${doubt})`;
  }
  const found = source.info(part.tensor).shape;
  if (`${found}` === `${sizesOf(part.shape)}`) return;
  const wrong = part.shape.flatMap(({ size, key }, i) => (found[i] === size ? [] : [`${key} = ${size}, here ${found[i]}`]));
  const why = found.length === part.shape.length ? wrong.join("; ") : `${found.length} dims where ${part.shape.length} were expected`;
  return `${part.tensor} has shape ${list(found)}; expected ${expected} (${why})`;
}

/** Classifies tensors that no parameter of the job reads: mismatches of the model, and notes. */
function surplusOf({ where }: Tensors, used: ReadonlySet<string>, model: Model): { mismatches: Mismatch[]; notes: string[] } {
  const names = [...where.keys()];
  const layers = model.layers + depthsOf(model);
  const numberOf = (name: string): number => Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? -1);
  const ahead = new Set(names.filter((name) => /\.(enorm|hnorm|eh_proj|shared_head)\./.test(name)).map(numberOf));
  const isAhead = (name: string): boolean =>
    (numberOf(name) >= layers && ahead.has(numberOf(name))) || Number(/^mtp\.(\d+)\./.exec(name)?.[1] ?? -1) >= depthsOf(model);
  const unused = names.filter(isAhead);
  // some old checkpoints have RoPE frequencies, which follow from the job
  const surplus = names.filter((name) => !used.has(name) && !isAhead(name) && !name.endsWith("rotary_emb.inv_freq"));
  const mismatches = surplus.flatMap((name): Mismatch[] => {
    const original = originalOf(name, model);
    if (original === undefined || same(where, name, original)) return [];
    const key = keyOfTensor(name, model);
    return [{ key, text: `${name} differs from ${original}, and the job has one of both (check ${key})` }];
  });
  const others = surplus.filter((name) => originalOf(name, model) === undefined);
  return {
    mismatches: [...mismatches, ...surplusMismatches(others, model)],
    notes: unused.length === 0 ? [] : [`tensors of multi-token prediction layers that the job has not are not used: ${unused.length}`],
  };
}

/** The tensor that one of the job's model repeats: the head of a tied model, and what multi-token prediction shares with the model. */
function originalOf(name: string, { layers, tie_embeddings }: Model): string | undefined {
  const [embed, head] = ["model.embed_tokens.weight", "lm_head.weight"];
  if (name === head && tie_embeddings) return embed;
  const [, n, leaf] = /^model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight$/.exec(name) ?? [];
  if (leaf === undefined || Number(n) < layers) return undefined;
  return leaf === "embed_tokens" || tie_embeddings ? embed : head;
}

function same(where: Tensors["where"], a: string, b: string): boolean {
  const [one, other] = [where.get(a), where.get(b)];
  if (!one || !other || `${one.info(a).shape}` !== `${other.info(b).shape}`) return false;
  const values = other.read(b);
  return one.read(a).every((value, i) => value === values[i]);
}

const list = (shape: readonly number[]): string => `[${shape.join(", ")}]`;
