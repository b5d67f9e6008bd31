/** The job that `rankc init` writes: a model, a cluster, and the mesh that `chooseMesh` chooses for them. */
import { type Device, deviceOf } from "../../../schemas/devices.ts";
import { completeJob, JobText } from "../../../schemas/job.ts";
import { Trouble } from "../../../schemas/trouble.ts";
import { parameterCount } from "../../analysis/parameterCount.ts";
import { bytesText, countText, millionsText } from "../../units.ts";
import { type CommentedKey, writeJob } from "../jobText.ts";
import { type ClusterChoice, chooseMesh, type JobDraft, withChoice } from "./chooseMesh.ts";
import { type ModelName, modelNames, presetOf } from "./models.ts";

/** What a person decides about a new job. */
export interface PresetSettings extends ClusterChoice {
  readonly model: ModelName;
  readonly name: string;
  /** data.path */
  readonly data: string;
  /** The path of the JSON Schema, from the folder of the job. */
  readonly schema?: string;
}

/** The largest cluster that is tried when a smaller one is refused. */
const LARGEST = 2 ** 14;

/** A row of `rankc init --list`. */
export interface ListedModel {
  readonly name: ModelName;
  readonly label: string;
  readonly parameters: number;
  /** Parameters that one token uses. */
  readonly active: number;
}

/** Returns the models with their sizes. */
export const listModels = (): ListedModel[] =>
  modelNames.map((name) => {
    const { model } = completeJob(JobText.parse(draftOf(name, name, "corpus.txt", "h100-80gb")));
    const active = parameterCount({ ...model, moe: model.moe && { ...model.moe, experts: model.moe.top_k } });
    return { name, label: presetOf(name).label, parameters: parameterCount(model), active };
  });

/** Returns the smallest number of GPUs, a power of 2, for which a mesh fits; undefined if there is none. */
export function fewestGpus(model: ModelName, device: Device, gpusPerNode: number): number | undefined {
  const draft = draftOf(model, model, "corpus.txt", device);
  for (let gpus = 1; gpus <= LARGEST; gpus *= 2) if (chooseMesh(draft, { gpus, gpusPerNode, device }, presetOf(model).batch)) return gpus;
  return undefined;
}

/** Returns the text of a job. Throws a Trouble if the model does not fit the cluster. */
export function presetJob(settings: PresetSettings): string {
  const { model: preset, gpus, device, gpusPerNode } = settings;
  const { label, batch } = presetOf(preset);
  const draft = draftOf(preset, settings.name, settings.data, device);
  const choice = chooseMesh(draft, settings, batch);
  if (!choice) {
    const enough = fewestGpus(preset, device, gpusPerNode);
    throw new Trouble(
      `${preset} has no mesh on ${gpus} x ${device}: it does not fit their memory, or ${gpus} has too few divisors`,
      enough === undefined ? "choose a smaller model or another device" : `${enough} GPUs are enough: --gpus ${enough}`,
    );
  }
  const job = completeJob(JobText.parse(withChoice(draft, choice, settings)));
  const tokens = choice.globalBatch * job.model.seq;
  const { tensor, pipeline, data, expert } = job.parallel;
  const comments: Readonly<Record<string, string>> = {
    "model.layers": `${millionsText(parameterCount(job.model))} parameters`,
    "model.vocab": "ids of the tokenizer are below it",
    "model.seq": "tokens in one sequence",
    "model.moe.top_k": "experts that each token is sent to",
    "model.moe.ffn": "inner width of one expert",
    "model.moe.rows_bound": "memory for 1.5 times the balanced load; a step that needs more ends the run",
    "parallel.world": `ranks, one GPU each: tensor ${tensor} x pipeline ${pipeline} x data ${data}`,
    "parallel.tensor": "ranks that share the matrices of a layer, within a node",
    "parallel.sequence": "activations between matrix products are sharded over them too",
    "parallel.pipeline": "stages, each with a part of the layers",
    "parallel.virtual_pipeline": "chunks of layers in each stage: less idle time",
    "parallel.layout": "layers of each chunk: E embedding, t layer, m further prediction, L head and loss",
    "parallel.expert": `ranks over which experts are spread: ${Math.ceil((job.model.moe?.experts ?? 0) / expert)} on each`,
    "parallel.distributed_optimizer": "main weights and moments are sharded over the data ranks",
    "train.global_batch": `sequences of a step: ${countText(tokens)} tokens`,
    "train.steps": `${millionsText(tokens * job.train.steps)} tokens`,
    "train.recompute": "activations that backward computes again, to save memory",
    "train.optimizer.lr": "the largest learning rate, after the warm-up",
    "data.path": "your text, token ids (.bin) or, as sources, data sets",
    "cluster.gpus_per_node": "with fast links among them",
    "cluster.device": `${bytesText(deviceOf(device).memory)} of memory`,
  };
  const written = flatten(withChoice(draft, choice, settings), "", job);
  const keys = written.map(({ key, value }): CommentedKey => ({ key, value, comment: comments[key] ?? "", isKept: chosen.has(key) }));
  const notes = [
    `${label}, on ${gpus} x ${device}. Written by rankc init; the mesh is the first that rankc search would try.`,
    "rankc check prints what is wrong with a change, rankc inspect shows memory, traffic and schedule.",
  ];
  return writeJob(keys, notes, settings.schema).text;
}

function draftOf(model: ModelName, name: string, path: string, device: Device): JobDraft {
  const preset = presetOf(model);
  const { lr, std, steps = 100_000 } = preset;
  return {
    name,
    model: preset.model,
    train: {
      ...{ steps, precision: deviceOf(device).links === null ? "fp32" : "bf16", init: { std } },
      optimizer: { lr, min_lr: Number((lr / 10).toPrecision(3)), warmup_steps: steps / 50, schedule: "cosine" },
    },
    data: { path },
    cluster: { device },
  };
}

/** Keys that stand in the job although they have their defaults, because a person chooses them. */
const chosen = new Set(["parallel.world", "train.precision", "cluster.gpus_per_node", "cluster.device"]);

/** Small maps of a job that stand on one line. */
const onOneLine = new Set([
  ...["model.norm", "model.rope", "model.mla", "model.mtp", "model.moe.layers", "model.moe.shared", "model.moe.router"],
  ...["train.init", "train.recompute"],
]);

/** Returns the keys of a job, with the value of each, in the order of `like`. */
function flatten(value: object, path: string, like: object): { key: string; value: unknown }[] {
  const order = Object.keys(like);
  return Object.entries(value)
    .sort(([a], [b]) => order.indexOf(a) - order.indexOf(b))
    .flatMap(([name, inner]) => {
      const key = path === "" ? name : `${path}.${name}`;
      const isMap = typeof inner === "object" && inner !== null && !Array.isArray(inner);
      return isMap && !onOneLine.has(key) ? flatten(inner, key, (like as Record<string, object>)[name] ?? {}) : [{ key, value: inner }];
    });
}
