/**
 * Compares the model of a checkpoint with the model of a job: which differences are errors unless --allow-mismatch names them, and which are notes.
 */
import { evenBy, hasExperts } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { depthsOf } from "../../schemas/mtp.ts";
import { Trouble } from "../../schemas/trouble.ts";

type Model = Job["model"];

/** A difference. `key`: the argument of --allow-mismatch that allows it; undefined if weights would be missing. */
export interface Mismatch {
  readonly key?: string;
  readonly text: string;
}

/** Keys of the model section that affect training only; the forward function does not depend on them. */
const training = [
  ...["model.seq", "model.dropout", "model.mtp"],
  ...["model.moe.dispatch", "model.moe.capacity", "model.moe.rows_bound"],
  ...["balance", "aux_coeff", "z_coeff", "jitter", "bias_rate", "quantile_ema", "precision"].map((key) => `model.moe.router.${key}`),
];

/** Returns whether `key` is `outer` or a key below it. */
const below = (outer: string, key: string): boolean => key === outer || key.startsWith(`${outer}.`);

/** Compares two model sections. Keys that change the forward function are mismatches; training choices are notes. */
export function modelDifferences(saved: Model, asked: Model): { readonly mismatches: Mismatch[]; readonly notes: string[] } {
  const layers = Math.min(saved.layers, asked.layers);
  const differences = [...diff(effective(saved, layers), effective(asked, layers), "model")];
  const even = [saved, asked].map(({ moe }) => moe && evenBy(moe.router));
  const isTraining = (key: string): boolean =>
    training.some((outer) => below(outer, key)) && !(key === "model.moe.router.balance" && even[0] !== even[1]);
  const all = differences.map(([key, a, b]) => ({ key, text: `${key} is ${textOf(a)} in the checkpoint, ${textOf(b)} in the job` }));
  return {
    mismatches: all.filter(({ key }) => !isTraining(key)),
    notes: all.filter(({ key }) => isTraining(key)).map(({ text }) => text),
  };
}

/** Keys of `train` that change how numbers are rounded. A checkpoint of a rankc without such a key has f32. */
const rounding = ["precision", "matmul", "gradients", "gradient_reduction"] as const;

/** Lists the keys of two train sections that round differently: a run may change them, and its losses then differ by rounding. */
export function roundingNotes(saved: Readonly<Record<string, unknown>>, asked: Job["train"]): string[] {
  return rounding.flatMap((key) => {
    const [a, b] = [saved[key] ?? "f32", asked[key] ?? "f32"];
    return a === b ? [] : [`train.${key} is ${textOf(a)} in the checkpoint, ${textOf(b)} in the job`];
  });
}

/** The keys that each type of RoPE scaling uses. */
const stretching = {
  linear: ["factor"],
  llama3: ["factor", "original_seq", "low_freq", "high_freq"],
  yarn: ["factor", "original_seq", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"],
} as const satisfies Record<string, readonly (keyof NonNullable<Model["rope"]["scaling"]>)[]>;

/** The model without keys that have no effect in it; where experts are, by layer, of the first `layers` ones. */
function effective(model: Model, layers: number): object {
  const { rope, moe, mla } = model;
  const sparse = Array.from({ length: model.layers }, (_, i) => Number(hasExperts(model, i)));
  const { scaling } = rope;
  return {
    ...model,
    ...(sparse.every((has) => has === 1) && { ffn: undefined }),
    ...(mla && { kv_heads: undefined, head_dim: undefined }),
    ...(model.positions !== "learned" && { max_positions: undefined }),
    rope: {
      ...rope,
      scaling: scaling && { type: scaling.type, ...Object.fromEntries(stretching[scaling.type].map((key) => [key, scaling[key]])) },
    },
    moe: moe && {
      ...moe,
      layers: sparse.slice(0, layers),
      router: { ...moe.router, ...(moe.router.groups === 1 && { group_top_k: undefined, group_scores: undefined }) },
    },
  };
}

function* diff(a: unknown, b: unknown, key: string): Generator<readonly [key: string, a: unknown, b: unknown]> {
  if (isSection(a) && isSection(b)) for (const k of new Set([...Object.keys(a), ...Object.keys(b)])) yield* diff(a[k], b[k], `${key}.${k}`);
  else if (JSON.stringify(a) !== JSON.stringify(b)) yield [key, a, b];
}
const isSection = (value: unknown): value is Readonly<Record<string, unknown>> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

function textOf(value: unknown): string {
  const text = value === undefined ? "without effect" : JSON.stringify(value);
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}

/** Returns mismatches for tensors that no parameter of the job reads; layers beyond the job's give one mismatch each. */
export function surplusMismatches(names: readonly string[], model: Model): Mismatch[] {
  const found = new Map<string, string[]>();
  for (const name of names) {
    const part = keyOfTensor(name, model) === "model.layers" ? /^(?:model\.)?layers\.\d+/.exec(name)?.[0] : undefined;
    found.set(part ?? name, [...(found.get(part ?? name) ?? []), name]);
  }
  return [...found].map(([part, [name = part, ...more]]) => {
    const key = keyOfTensor(name, model);
    const size = part === name ? "" : ` (${more.length + 1} tensors)`;
    return { key, text: `${part}${size} is there, and the job has no such part${key === name ? "" : ` (check ${key})`}` };
  });
}

/** Returns the job key that decides whether a tensor is part of the model; the name of the tensor if there is no such key. */
export function keyOfTensor(name: string, model: Model): string {
  const [, theirs, kind, n, leaf] = /^(model\.)?(layers|mtp)\.(\d+)\.(.+)$/.exec(name) ?? [];
  if (leaf === undefined) return name === "head" || name === "lm_head.weight" ? "model.tie_embeddings" : name;
  // Hugging Face's names number multi-token prediction after the layers, ours apart from them
  if (kind === "layers" && Number(n) >= model.layers + (theirs ? depthsOf(model) : 0)) return "model.layers";
  return keys.find(([what]) => what.test(leaf))?.[1] ?? name;
}
const keys = [
  [/^(enorm|hnorm|eh_proj|proj$|shared_head|embed_tokens)/, "model.mtp"],
  [/o_proj\.bias$|^bo$/, "model.out_bias"],
  [/e_score_correction_bias$|^router_bias$/, "model.moe.router.expert_bias"],
  [/^router_beta$/, "model.moe.router.balance"],
  [/[qkv]_proj\.bias$|^b[qkv]$/, "model.qkv_bias"],
  [/^latent\./, "model.moe.latent"],
  [/shared.*gate(\.weight)?$/, "model.moe.shared.gate"],
  [/shared/, "model.moe.shared"],
  [/_[ab]_|_[ab]$|kv_norm|[kv]_proj\.weight$|^w[kv]$/, "model.mla"],
  [/[qk]_norm/, "model.qk_norm"],
  [/expert|router|^mlp\./, "model.moe"],
] as const;

/**
 * Returns notes on the mismatches that are allowed, one for each key; `allowed`: keys, with or without `model.` before them, and those
 * below are allowed with them. Throws a Trouble that lists all others and says what would allow them.
 */
export function expectAllowed(file: string, mismatches: readonly Mismatch[], allowed: readonly string[], fix: string): string[] {
  const isAllowed = ({ key }: Mismatch): boolean =>
    key !== undefined && allowed.some((outer) => below(outer, key) || below(`model.${outer}`, key));
  const refused = mismatches.filter((mismatch) => !isAllowed(mismatch));
  const keysOf = (all: readonly Mismatch[]): string[] => [...new Set(all.flatMap(({ key }) => key ?? []))];
  if (refused.length > 0) {
    const flags = keysOf(refused).map((key) => `--allow-mismatch ${key}`);
    const some = [...flags.slice(0, 10), ...(flags.length > 10 ? ["…"] : [])].join(" ");
    const mayAllow = refused.every(({ key }) => key !== undefined);
    throw new Trouble(
      summary(
        file,
        refused.map(({ text }) => text),
      ),
      mayAllow ? `${fix}; or, where the difference is meant: ${some}` : fix,
    );
  }
  return keysOf(mismatches).map((of) => {
    const texts = mismatches.filter(({ key }) => key === of).map(({ text }) => text);
    return `allowed: ${texts[0]}${texts.length > 1 ? `, and ${texts.length - 1} more of ${of}` : ""}`;
  });
}

/** The error text for mismatches: the first ten, and the number of all. */
function summary(file: string, problems: readonly string[]): string {
  const more = problems.length > 10 ? [`and ${problems.length - 10} more`] : [];
  const lines = [...problems.slice(0, 10), ...more].map((line) => `\n  ${line}`);
  return `${file}: does not fit the job in ${problems.length} place${problems.length === 1 ? "" : "s"}${lines.join("")}`;
}
