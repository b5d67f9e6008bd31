/**
 * Launches that Megatron refuses, when it parses the arguments or in the first step, and that a job cannot express: the import would drop
 * one of the arguments silently. Combinations that a job expresses are checked by the rules of jobs. The tables follow Megatron-LM at commit
 * d98e8a64; `given` names the arguments that the message shows.
 */
import type { Arguments } from "../arguments/read.ts";
import { argumentSpecs } from "../arguments/spec.ts";
import { knownValue } from "../bash/text.ts";
import { partCount } from "../job/parallel.ts";

/** The arguments of a launch by name, with Megatron's defaults. A value that only a shell can compute is undefined. */
export interface LaunchArguments {
  has(name: string): boolean;
  number(name: string): number | undefined;
  text(name: string): string | undefined;
  /** Returns the values of an argument that takes several; unknown values are left out. */
  list(name: string): readonly string[];
  /** Returns the arguments among these that are given, as in the launch. */
  shown(...names: readonly string[]): string;
  /** The data degree. */
  readonly data: number;
}

/** A launch that Megatron refuses. */
export interface Refusal {
  readonly given: readonly string[];
  /** The text of the message if none of these is given; default: the first is missing. */
  readonly otherwise?: string;
  readonly when: (launch: LaunchArguments) => boolean;
  readonly why: string;
  readonly fix: string;
}

/** An argument that Megatron accepts only if `holds` is true. */
export const needing = (
  name: string,
  holds: (launch: LaunchArguments) => boolean,
  what: string,
  beside: readonly string[] = [],
): Refusal => ({
  given: [name, ...beside],
  when: (l) => l.has(name) && !holds(l),
  why: `Megatron takes it with ${what} alone`,
  fix: "leave it out, or give that",
});

/** An argument that Megatron refuses if `holds` is true. */
export const excluding = (
  name: string,
  holds: (launch: LaunchArguments) => boolean,
  what: string,
  beside: readonly string[] = [],
): Refusal => ({
  given: [name, ...beside],
  when: (l) => l.has(name) && holds(l),
  why: `Megatron refuses it beside ${what}`,
  fix: "leave out one of them",
});

/** Arguments that exclude each other in Megatron. */
export const together = (...names: readonly string[]): Refusal => ({
  given: names,
  when: (l) => names.every((name) => l.has(name)),
  why: "Megatron takes one of them alone",
  fix: "leave out the others",
});

/**
 * Returns the arguments of a launch. `onUnknown` is called when a value is read that only a shell can compute. Throws for a name that
 * Megatron does not have.
 */
export function launchOf(args: Arguments, data: number, onUnknown: () => void): LaunchArguments {
  const specOf = (name: string) => {
    const spec = argumentSpecs.get(name);
    if (!spec) throw new Error(`Megatron has no argument ${name}`);
    return spec;
  };
  const valuesOf = (name: string): readonly (string | undefined)[] => {
    const given = args.given.get(specOf(name).name);
    if (given) {
      const values = given.values.map(knownValue);
      if (values.includes(undefined)) onUnknown();
      return values;
    }
    return specOf(name).default?.split(" ") ?? [];
  };
  return {
    data,
    has: (name) => args.given.has(specOf(name).name),
    text: (name) => valuesOf(name)[0],
    number(name) {
      const [value] = valuesOf(name);
      return value === undefined || value.trim() === "" || Number.isNaN(Number(value)) ? undefined : Number(value);
    },
    list: (name) => valuesOf(name).flatMap((value) => value?.split(/\s+/) ?? []),
    shown: (...names) => names.flatMap((name) => args.given.get(specOf(name).name)?.shown ?? []).join(" "),
  };
}

// -- conditions that several tables use

/** The degrees, with Megatron's defaults. */
export const degree = {
  tensor: (l: LaunchArguments): number => l.number("tensor-model-parallel-size") ?? 1,
  pipeline: (l: LaunchArguments): number => l.number("pipeline-model-parallel-size") ?? 1,
  context: (l: LaunchArguments): number => l.number("context-parallel-size") ?? 1,
  expert: (l: LaunchArguments): number => l.number("expert-model-parallel-size") ?? 1,
  expertTensor: (l: LaunchArguments): number => l.number("expert-tensor-parallel-size") ?? degree.tensor(l),
} as const;

/** Whether the model has experts. */
export const hasExperts = (l: LaunchArguments): boolean => (l.number("num-experts") ?? 0) > 0;
/** Whether sequence parallelism has an effect: it needs tensor parallelism. */
export const isSequenceParallel = (l: LaunchArguments): boolean => l.has("sequence-parallel") && degree.tensor(l) > 1;
/** Whether products run in fp8 or fp4. */
export const isQuantized = (l: LaunchArguments): boolean => l.has("fp8-format") || l.has("fp4-format");
/** Whether parameters have 16 bits. */
export const isHalf = (l: LaunchArguments): boolean => l.has("bf16") || l.has("fp16");
/** Whether FSDP shards the parameters. */
export const isSharded = (l: LaunchArguments): boolean => l.has("use-megatron-fsdp") || l.has("use-torch-fsdp2");
/** Whether layers are those of Transformer Engine. */
export const isTransformerEngine = (l: LaunchArguments): boolean => l.text("transformer-impl") === "transformer_engine";
/** Whether stages have several chunks. */
export function hasChunks(l: LaunchArguments): boolean {
  const stages = degree.pipeline(l);
  const layout = l.text("pipeline-model-parallel-layout")?.replace(/[\s,'"]/g, "");
  if (layout !== undefined) return partCount(layout) > stages;
  const each = l.number("num-layers-per-virtual-pipeline-stage");
  const counted = ["account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split"].filter((name) => l.has(name)).length;
  if (each !== undefined) return ((l.number("num-layers") ?? 0) + counted) / stages > each;
  return (l.number("num-virtual-stages-per-pipeline-rank") ?? 1) > 1;
}
/** Whether a module is recomputed selectively. */
export const recomputes = (l: LaunchArguments, module: string): boolean =>
  l.text("recompute-granularity") === "selective" && l.list("recompute-modules").includes(module);
/** Whether tokens are dispatched in one of these ways. */
export const dispatchesBy = (l: LaunchArguments, ...types: readonly string[]): boolean =>
  types.includes(l.text("moe-token-dispatcher-type") ?? "allgather");
/** Whether the flex dispatcher uses one of these libraries. */
export const usesBackend = (l: LaunchArguments, ...names: readonly string[]): boolean =>
  dispatchesBy(l, "flex") && names.includes(l.text("moe-flex-dispatcher-backend") ?? "deepep");
