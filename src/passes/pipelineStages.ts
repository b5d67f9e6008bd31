/**
 * Assignment of the positions of the model (embedding, layers, layers of multi-token prediction, head) to virtual stages. Virtual
 * stage v is chunk floor(v / stages) of stage v % stages (Narayanan et al. 2021). A virtual stage may hold no position.
 */
import type { Job } from "../../schemas/job.ts";
import { headAt } from "../model/positions.ts";
import { invariant } from "../ops/op.ts";
import { countText } from "../units.ts";

/** Stages, chunks of each stage, and the virtual stage of each position. */
export interface Pipeline {
  readonly stages: number;
  readonly chunks: number;
  /** The virtual stage of each position, ascending. */
  readonly of: readonly number[];
}

type Sized = Pick<Job, "model" | "parallel">;

/**
 * Returns the pipeline of a job. `parallel.layout` decides if present; otherwise layers are split evenly in order, the embedding is
 * with the first layer, and the head and multi-token prediction are with the last. A single stage always has one chunk. A layout that
 * cannot be read gives a pipeline without positions; a rule reports it.
 */
export function pipelineOf(job: Sized): Pipeline {
  const { pipeline: stages, virtual_pipeline, layout } = job.parallel;
  const { layers } = job.model;
  if (layout === null) {
    const virtual = stages * virtual_pipeline;
    const first = (p: number): number => Math.max(1, Math.min(layers, p)) - 1;
    const of = Array.from({ length: headAt(job.model) + 1 }, (_, p) => Math.floor((first(p) * virtual) / layers));
    return { stages, chunks: virtual_pipeline, of };
  }
  const parts = readLayout(layout);
  if (typeof parts === "string") return { stages, chunks: 1, of: [] };
  const virtual = (v: number): number => (stages === 1 ? 0 : v);
  return {
    stages,
    chunks: stages === 1 ? 1 : parts.length / stages,
    of: parts.flatMap((part, v) => Array.from(part, () => virtual(v))),
  };
}

/** Returns the virtual stage of a position. Throws an invariant if the pipeline has no such position. */
export function virtualStageAt({ of }: Pick<Pipeline, "of">, position: number): number {
  const virtual = of[position];
  invariant(virtual !== undefined, () => `the pipeline has no position ${position}`);
  return virtual;
}

/** Returns the stage that runs virtual stage `v`. */
export const stageOfVirtual = ({ stages }: Pick<Pipeline, "stages">, v: number): number => v % stages;
/** Returns the chunk that virtual stage `v` is on its stage. */
export const chunkOfVirtual = ({ stages }: Pick<Pipeline, "stages">, v: number): number => Math.floor(v / stages);

/** Returns the pipeline as text: a line for each virtual stage with its positions. */
export function printPipeline(pipeline: Pipeline, { model }: Pick<Job, "model">): string {
  const nameOf = (position: number): string => {
    if (position === 0) return "embedding";
    if (position === headAt(model)) return "head";
    return position <= model.layers ? `layer ${position - 1}` : `mtp ${position - model.layers}`;
  };
  const names = pipeline.of.map((virtual, position) => ({ virtual, name: nameOf(position) }));
  const lines = Array.from({ length: pipeline.stages * pipeline.chunks }, (_, v) => {
    const own = names.filter(({ virtual }) => virtual === v).map(({ name }) => name);
    return `stage ${stageOfVirtual(pipeline, v)}, chunk ${chunkOfVirtual(pipeline, v)}: ${own.join(", ") || "nothing"}\n`;
  });
  return lines.join("");
}

/** Returns the range [first, end) of layers of a virtual stage; first = end if it has no layer. */
export function layersOf({ of }: Pipeline, { model }: Pick<Job, "model">, v: number): [number, number] {
  const layer = (p: number) => Math.max(0, Math.min(model.layers, p - 1));
  const first = of.findIndex((at) => at >= v);
  const after = of.findIndex((at) => at > v);
  return [layer(first < 0 ? of.length : first), layer(after < 0 ? of.length : after)];
}

/** The largest number of letters of a layout after its repetitions are expanded, far more than the 4,096 layers that a model may have. */
const LONGEST = 1e6;
const TOO_LONG = `repetitions make the layout longer than ${countText(LONGEST)} letters`;

/**
 * Parses a pipeline layout in the notation of Megatron Core, `Et*3|(tt|)*29,m|L`. E is the embedding, t a layer, m a layer of
 * multi-token prediction, L the head and the loss. | separates virtual stages, ( ) groups, *n repeats the item before it; commas and
 * spaces are ignored. Returns the letters of each virtual stage as a list, or an error message with the character position.
 */
export function readLayout(text: string): string[] | string {
  /** Open groups, outermost first: the complete text, and the last item, which a repetition may follow. */
  const outer: { text: string; item: string }[] = [];
  let group = { text: "", item: "" };
  const next = (item: string): void => {
    group = { text: group.text + group.item, item };
  };
  for (const { 0: token, index } of text.matchAll(/\*\d*|./gsu)) {
    const wrong = (what: string): string => `${what} at character ${index + 1}`;
    if (token === "(") {
      outer.push(group);
      group = { text: "", item: "" };
    } else if (token === ")") {
      const whole = group.text + group.item;
      const around = outer.pop();
      if (!around) return wrong("a group is closed that was not opened");
      group = around;
      next(whole);
    } else if (token.startsWith("*")) {
      if (token === "*") return wrong("a number must follow *");
      if (group.item === "") return wrong("nothing stands before *");
      const times = Number(token.slice(1));
      if (times > LONGEST || group.text.length + group.item.length * times > LONGEST) return wrong(TOO_LONG);
      group = { text: group.text + group.item.repeat(times), item: "" };
    } else if ("Etm|L".includes(token)) next(token);
    else if (token !== " " && token !== ",") return wrong(`${JSON.stringify(token)} means nothing: E, t, m, L, |, ( ), commas and *n do`);
    if (group.text.length > LONGEST) return wrong(TOO_LONG);
  }
  if (outer.length > 0) return `a group is not closed at character ${text.length + 1}`;
  const all = group.text + group.item;
  const flat = all.replaceAll("|", "");
  if (!/^Et*m*L$/.test(flat))
    return `it places ${flat.length > 20 ? `${flat.slice(0, 20)}…` : flat || "nothing"}: the embedding E comes first, then the layers t, then those of multi-token prediction m, then the head L, each of E and L once`;
  return all.split("|");
}

/** Returns whether a job runs forwards and backwards in pairs: it does where there are exchanges of rows to hide. */
export const runsInPairs = ({ parallel: p }: Pick<Job, "parallel">): boolean =>
  p.expert_overlap === "interleave" && p.expert > 1 && p.schedule === "1f1b";
