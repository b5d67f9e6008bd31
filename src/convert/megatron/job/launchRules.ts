/**
 * Combinations of arguments that Megatron refuses and that a job cannot express: the import would drop one of the arguments silently.
 * Combinations that a job expresses are checked by the rules of jobs.
 */
import type { MappedName } from "../arguments/spec.ts";
import type { Importing } from "./importing.ts";

const CHUNKS = ["num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank"] as const;
const SPLITS = [
  ...CHUNKS,
  "decoder-first-pipeline-num-layers",
  "decoder-last-pipeline-num-layers",
  "account-for-embedding-in-pipeline-split",
  "account-for-loss-in-pipeline-split",
] as const;

/** Arguments that exclude each other in Megatron. */
const exclusive: readonly (readonly MappedName[])[] = [
  CHUNKS,
  ...SPLITS.map((name) => ["pipeline-model-parallel-layout", name] as const),
  ["mock-data", "data-path"],
  ["mock-data", "train-data-path"],
  ["data-path", "train-data-path"],
];

/** Arguments that Megatron accepts only together with another one. */
const needing: readonly (readonly [name: MappedName, other: MappedName])[] = [
  ["moe-pad-expert-input-to-capacity", "moe-expert-capacity-factor"],
  ["moe-latent-size", "num-experts"],
  ["moe-ffn-hidden-size", "num-experts"],
];

/** Reports combinations that Megatron refuses. */
export function checkLaunch({ args, job }: Importing): void {
  const shown = (...names: readonly MappedName[]): string => names.flatMap((name) => args.given.get(name)?.shown ?? []).join(" ");
  for (const names of exclusive)
    if (names.every((name) => args.has(name))) job.reject(shown(...names), "Megatron takes one of them alone", "leave out the others");
  for (const [name, other] of needing)
    if (args.has(name) && !args.has(other))
      job.reject(shown(name), `Megatron refuses it without --${other}`, `give --${other}, or leave it out`);
  const padding: MappedName = "moe-pad-expert-input-to-capacity";
  if (args.has(padding) && (args.numberIfGiven("moe-expert-capacity-factor") ?? 0) < 0)
    job.reject(
      shown(padding, "moe-expert-capacity-factor"),
      "a negative factor drops nothing, so that there is no capacity",
      "give a factor of 0 or more",
    );
  const seq = args.numberIfGiven("seq-length");
  const positions = args.numberIfGiven("max-position-embeddings");
  if (seq !== undefined && positions !== undefined && seq > positions)
    job.reject(
      shown("seq-length", "max-position-embeddings"),
      "a sequence has more tokens than positions",
      "give --max-position-embeddings of at least --seq-length",
    );
  if (args.number("expert-model-parallel-size") > 1 && (args.numberIfGiven("num-experts") ?? 0) === 0)
    job.reject(shown("expert-model-parallel-size"), "the model has no experts", "give --num-experts, or leave it out");
  if ((args.numberIfGiven("moe-shared-expert-intermediate-size") ?? 1) <= 0)
    job.reject(shown("moe-shared-expert-intermediate-size"), "a shared expert has a positive width", "leave it out");
  checkDecay({ args, job });
  checkRecompute({ args, job });
}

function checkDecay({ args, job }: Importing): void {
  const [start, end] = [args.numberIfGiven("start-weight-decay"), args.numberIfGiven("end-weight-decay")];
  const shown = [args.given.get("start-weight-decay"), args.given.get("end-weight-decay")].flatMap((given) => given?.shown ?? []).join(" ");
  if (args.text("weight-decay-incr-style") === "constant") {
    if (start !== undefined || end !== undefined)
      job.reject(shown, "weight decay is constant", "give --weight-decay-incr-style, or leave them out");
  } else if (start !== undefined && end !== undefined && end < start)
    job.reject(shown, "weight decay does not shrink", "give an end of at least the start");
}

function checkRecompute({ args, job }: Importing): void {
  const mode = args.textIfGiven("recompute-granularity");
  const given = args.given.get("recompute-method") ?? args.given.get("recompute-num-layers");
  if (mode === "selective" && given) job.reject(given.shown, "--recompute-granularity selective takes no layers", "leave it out");
  if (mode === "full" && args.has("moe-layer-recompute"))
    job.reject("--moe-layer-recompute", "--recompute-granularity full recomputes whole layers", "leave it out");
}
