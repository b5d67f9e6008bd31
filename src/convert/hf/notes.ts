/** The notes of an imported job: assumptions and omissions; and the selection of its device. */
import { type Device, deviceNames, deviceOf, devices } from "../../../schemas/devices.ts";
import type { Job } from "../../../schemas/job.ts";
import { parameterCount } from "../../analysis/parameterCount.ts";
import { countText } from "../../units.ts";
import { type Config, isRecord, shown } from "./configReader.ts";
import type { Experts } from "./families.ts";

type Model = Job["model"];

/** Returns the bytes to train a model on one rank: bf16 parameters, f32 gradients, main weights and two moments. */
export const bytesToTrain = (model: Model): number => 18 * parameterCount(model);

/** Bandwidth in bytes/s between GPUs of a host from which on models are usually trained over several of them: NVLink, and not PCIe. */
const FAST_LINKS = 200e9;
const isForTraining = (name: Device): boolean => {
  const { links, target } = deviceOf(name);
  return links !== null && links.host >= FAST_LINKS && target !== "cpu";
};
/** The GPUs for which rankc generates kernels and which fast links connect, by memory, the smallest first. */
const gpus = deviceNames.filter(isForTraining).sort((a, b) => devices[a].memory - devices[b].memory);
const largestGpu = gpus.reduce((_, name) => name);

/** Returns the smallest GPU with twice this memory, because activations need memory too; else the largest. */
export function roomiest(bytes: number): Device {
  return gpus.find((name) => devices[name].memory > 2 * bytes) ?? largestGpu;
}

/** The facts of an import that notes report. */
export interface Imported {
  /** The experts of the family; null if it has none. */
  readonly experts: Experts | null;
  /** The longest sequence of the config. */
  readonly positions: number;
  /** The attention window in tokens; null: no limit. */
  readonly window: unknown;
}

/** Returns the notes, one line each, without comment signs. */
export function notesOf(config: Config, model: Model, { experts, positions, window }: Imported): readonly string[] {
  return [
    ...sequenceNotes(model, positions, window),
    ...(model.moe && experts ? expertNotes(model.moe, experts) : []),
    ...restNotes(config, model),
  ];
}

function sequenceNotes(model: Model, positions: number, window: unknown): readonly string[] {
  const notes: string[] = [];
  if (model.seq < positions) notes.push(`model.seq: the model takes up to ${positions} tokens; training starts with ${model.seq}.`);
  if (typeof window === "number" && window < positions)
    notes.push(
      `model.seq: keep it at ${window} or less. In this model a token attends to the last ${window} tokens (sliding_window); rankc has no window,`,
      "and with longer sequences it trains another model.",
    );
  if (model.vocab !== 256)
    notes.push(
      `data: the text is read as bytes, of which a vocabulary of ${model.vocab} uses ${model.vocab < 256 ? "too few: ASCII at most" : "the first 256 ids"}.`,
    );
  return notes;
}

function expertNotes({ experts: count, router }: NonNullable<Model["moe"]>, { aux, exact }: Experts): readonly string[] {
  const notes: string[] = [];
  if (router.balance !== "none") {
    notes.push(
      ...(aux.perSequence === null
        ? [
            `model.moe.router.aux_coeff: taken from ${aux.key}; transformers counts over all layers and all k choices at once, here each layer is`,
            "balanced by itself, as in Megatron Core: the same number weighs differently.",
          ]
        : [
            `model.moe.router.balance: taken from ${aux.key} and ${aux.perSequence}, as in DeepSeek's own code; transformers has no such loss.`,
          ]),
    );
  }
  if (router.precision === "fp32" && !exact)
    notes.push(
      `model.moe.router.precision: logits of ${count} experts are often equal in bf16; transformers keeps them in the model's type.`,
    );
  if (router.expert_bias)
    notes.push(
      "model.moe.router.bias_rate: the config does not say how far the experts' biases move in a step; DeepSeek-V3 trained with 0.001.",
    );
  return notes;
}

function restNotes(config: Config, model: Model): readonly string[] {
  const notes: string[] = [];
  if (model.mtp)
    notes.push("model.mtp.coeff: the config does not say how much further tokens weigh; DeepSeek-V3 trained with 0.3, then 0.1.");
  else if (typeof config.num_nextn_predict_layers === "number" && config.num_nextn_predict_layers > 0) {
    notes.push(
      `model.layers: a checkpoint's further layers (${config.num_nextn_predict_layers}), which predict tokens after the next, are not read; --mtp takes them.`,
    );
  }
  const bytes = bytesToTrain(model);
  if (bytes > devices[largestGpu].memory)
    notes.push(
      `parallel: weights, gradients and optimizer take about ${countText(Math.round(bytes / 1e9))} GB: raise world and the degrees before a run.`,
    );
  const quantized = config.quantization_config;
  if (isRecord(quantized)) {
    notes.push(
      `model: the checkpoint's weights are quantized (quantization_config, ${shown(quantized.quant_method)}): convert them to 16 bits before --init-from reads them.`,
    );
  }
  const dtype = config.dtype ?? config.torch_dtype;
  if (dtype !== undefined) {
    const named = typeof dtype === "string" && /^\w{1,40}$/.test(dtype) ? dtype : shown(dtype);
    notes.push(`train.precision: the checkpoint is kept in ${named}; training here is bf16 with f32 master weights.`);
  }
  return notes;
}
