/** The settings of a torchtitan configuration: what the importer reads, and what does not change a plan. */
import leven from "leven";
import { parse, TomlError } from "smol-toml";
import { Trouble } from "../../../schemas/trouble.ts";
import type { Problem } from "../problems.ts";

/** Settings that the importer maps, with torchtitan's defaults; null: there is none. */
export const mappedSettings = {
  "model.name": null,
  "model.flavor": "debugmodel",
  "model.converters": null,
  "optimizer.name": "AdamW",
  "optimizer.lr": 8e-4,
  "optimizer.beta1": 0.9,
  "optimizer.beta2": 0.95,
  "optimizer.eps": 1e-8,
  "optimizer.weight_decay": 0.1,
  "optimizer.early_step_in_backward": false,
  "lr_scheduler.warmup_steps": 200,
  "lr_scheduler.decay_ratio": null,
  "lr_scheduler.decay_type": "linear",
  "lr_scheduler.min_lr_factor": 0,
  "lr_scheduler.lr_min": 0,
  "training.local_batch_size": 8,
  "training.global_batch_size": -1,
  "training.seq_len": 2048,
  "training.max_norm": 1,
  "training.steps": 10000,
  "training.seed": null,
  "training.mixed_precision_param": "bfloat16",
  "training.dtype": "float32",
  "parallelism.data_parallel_replicate_degree": 1,
  "parallelism.data_parallel_shard_degree": -1,
  "parallelism.tensor_parallel_degree": 1,
  "parallelism.pipeline_parallel_degree": 1,
  "parallelism.pipeline_parallel_schedule": "1F1B",
  "parallelism.pipeline_parallel_layers_per_stage": null,
  "parallelism.pipeline_parallel_microbatch_size": 1,
  "parallelism.pipeline_parallel_first_stage_less_layers": 1,
  "parallelism.pipeline_parallel_last_stage_less_layers": 1,
  "parallelism.pipeline_parallel_split_points": null,
  "parallelism.module_fqns_per_model_part": null,
  "parallelism.context_parallel_degree": 1,
  "parallelism.context_parallel_rotate_method": "allgather",
  "parallelism.expert_parallel_degree": 1,
  "parallelism.expert_tensor_parallel_degree": 1,
  "activation_checkpoint.mode": "selective",
  "debug.moe_force_load_balance": false,
} as const;

/** Settings of which torchtitan takes some texts alone. */
const choices: Readonly<Partial<Record<SettingName, readonly string[]>>> = {
  "lr_scheduler.decay_type": ["linear", "sqrt", "cosine"],
  "training.dtype": ["float32", "bfloat16"],
  "training.mixed_precision_param": ["bfloat16", "float32"],
  "parallelism.context_parallel_rotate_method": ["allgather", "alltoall"],
  "activation_checkpoint.mode": ["none", "selective", "full", "memory_budget"],
};

/** The name of a setting that the importer maps. */
export type SettingName = keyof typeof mappedSettings;

/** Settings and sections without effect on the plan, with the reason. A name without a point, or with a final point, is a section. */
const withoutEffect: readonly { readonly why: string; readonly names: string }[] = [
  {
    why: "concerns what a run prints and records",
    names: "job metrics profiling comm validation experimental memory_estimation fault_tolerance",
  },
  { why: "concerns how checkpoints are written and read; `rankc run` has its own", names: "checkpoint" },
  {
    why: "chooses kernels; those of the plan are rankc's own",
    names: "compile training.compile optimizer.implementation training.deterministic debug.deterministic",
  },
  { why: "is a detail of 8-bit products, and has no effect without model.converters", names: "float8 mx quantize" },
  {
    why: "concerns the tokenizer and the data; set data.path",
    names: "model.tokenizer_path model.hf_assets_path training.dataset training.dataset_path training.dataloader",
  },
  {
    why: "concerns how the step is run, not what it computes",
    names:
      "model.print_after_conversion training.gc_freq training.gc_debug parallelism.enable_compiled_autograd parallelism.enable_async_tensor_parallel parallelism.disable_loss_parallel parallelism.pipeline_parallel_schedule_csv parallelism.fsdp_reshard_after_forward activation_checkpoint.selective_ac_option activation_checkpoint.early_stop",
  },
  { why: "is what rankc does: gradients are summed in fp32", names: "training.mixed_precision_reduce" },
  {
    why: "keeps values in host memory; the plan keeps them on the device, so that its peak is higher",
    names: "training.enable_cpu_offload",
  },
];

type Value = string | number | boolean | readonly string[];

/** The settings of a file. */
export interface TitanSettings {
  readonly given: ReadonlyMap<string, Value>;
  has(name: SettingName): boolean;
  /** Reads a number, or torchtitan's default. */
  number(name: SettingName): number;
  numberIfGiven(name: SettingName): number | undefined;
  /** Reads a text, or torchtitan's default. */
  text(name: SettingName): string;
  textIfGiven(name: SettingName): string | undefined;
  flag(name: SettingName): boolean;
}

/** Returns why a setting has no effect; undefined for other settings. */
export function whyWithoutEffect(name: string): string | undefined {
  return withoutEffect.find(({ names }) => names.split(" ").some((known) => name === known || name.startsWith(`${known}.`)))?.why;
}

function flatten(table: object, path: string, into: Map<string, Value>): void {
  for (const [key, value] of Object.entries(table)) {
    const name = path === "" ? key : `${path}.${key}`;
    if (Array.isArray(value)) into.set(name, value.map(String));
    else if (typeof value === "string" || typeof value === "number" || typeof value === "boolean") into.set(name, value);
    else if (typeof value === "bigint") into.set(name, Number(value));
    else if (value instanceof Date) into.set(name, String(value));
    else if (typeof value === "object" && value !== null) flatten(value, name, into);
  }
}

/** Reads a configuration. Settings that torchtitan does not have, and values of another type, are added to `problems`. Throws a Trouble if the text is no TOML. */
export function readSettings(text: string, file: string, dropped: ReadonlySet<string>, problems: Problem[]): TitanSettings {
  const given = new Map<string, Value>();
  try {
    flatten(parse(text), "", given);
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    throw new Trouble(`${file}:${error.line}: not TOML: ${error.message.split("\n")[0]}`, "name a configuration of torchtitan");
  }
  for (const name of dropped) given.delete(name);
  for (const [name, value] of given)
    if (!Object.hasOwn(mappedSettings, name) && whyWithoutEffect(name) === undefined) problems.push(unknownSetting(name, value));
  const reported = new Set<string>();
  const wrong = (name: string, wanted: string): undefined => {
    // several readers may ask for a setting
    if (reported.has(name)) return undefined;
    reported.add(name);
    problems.push({
      kind: "value",
      subject: `${name} = ${String(given.get(name))}`,
      why: `torchtitan reads ${wanted} here`,
      fix: `write ${wanted}`,
    });
    return undefined;
  };
  const numberIfGiven = (name: SettingName): number | undefined => {
    const value = given.get(name);
    return value === undefined || typeof value === "number" ? value : wrong(name, "a number");
  };
  const textIfGiven = (name: SettingName): string | undefined => {
    const value = given.get(name);
    const known = choices[name];
    if (known && value !== undefined && !known.some((choice) => choice === value)) return wrong(name, `one of ${known.join(", ")}`);
    return value === undefined || typeof value === "string" ? value : wrong(name, "a text");
  };
  return {
    given,
    has: (name) => given.has(name),
    numberIfGiven,
    textIfGiven,
    number: (name) => numberIfGiven(name) ?? Number(mappedSettings[name] ?? 0),
    text: (name) => textIfGiven(name) ?? String(mappedSettings[name] ?? ""),
    flag(name) {
      const value = given.get(name);
      return (value === undefined || typeof value === "boolean" ? value : wrong(name, "true or false")) ?? false;
    },
  };
}

function unknownSetting(name: string, value: Value): Problem {
  const near = Object.keys(mappedSettings)
    .map((known) => ({ known, far: leven(name, known) }))
    .sort((a, b) => a.far - b.far)[0];
  const isNear = near !== undefined && near.far <= Math.max(2, Math.floor(name.length / 4));
  return {
    kind: "unknown",
    subject: `${name} = ${String(value)}`,
    why: "rankc knows no such setting of torchtitan",
    fix: `${isNear ? `${near.known} is the nearest; ` : ""}--drop ${name} leaves it out`,
  };
}
