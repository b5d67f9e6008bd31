/**
 * pipeline: which virtual stage holds each position of the model (the embedding, the layers, those of multi-token prediction, the
 * head). Virtual stage v is
 * chunk floor(v / stages) of stage v % stages: with chunks, a stage has several groups of layers (Narayanan et al. 2021).
 */
import { depthsOf, type Job } from "../schemas/job.ts";

export interface Pipeline {
  readonly stages: number;
  readonly chunks: number;
  /** By position: the virtual stage. Never falls. */
  readonly of: readonly number[];
}

type Sized = Pick<Job, "model" | "parallel">;

type Model = Pick<Job["model"], "layers" | "mtp">;
/** Positions of the model: the embedding is 0, layers count from 1, depths of multi-token prediction come after them, then the head. */
export const layerAt = (layer: number): number => 1 + layer;
export const depthAt = ({ layers }: Model, k: number): number => layers + k;
export const headAt = (model: Model): number => model.layers + depthsOf(model) + 1;

/**
 * By `parallel.layout` where it is given, else layers are split evenly, in order: the embedding goes with the first, the head and
 * multi-token prediction with the last.
 */
export function pipelineOf(job: Sized): Pipeline {
  const { pipeline: stages, virtual_pipeline: chunks, layout } = job.parallel;
  const { layers } = job.model;
  const positions = headAt(job.model) + 1;
  if (layout === null) {
    const virtual = stages * chunks;
    const of = Array.from({ length: positions }, (_, p) => Math.floor(((Math.max(1, Math.min(layers, p)) - 1) * virtual) / layers));
    return { stages, chunks, of };
  }
  const parts = readLayout(layout);
  const of = typeof parts === "string" ? [] : parts.flatMap((part, v) => [...part].map(() => v));
  return { stages, chunks: typeof parts === "string" ? 1 : parts.length / stages, of };
}

export const stageOfVirtual = ({ stages }: Pick<Pipeline, "stages">, v: number): number => v % stages;
export const chunkOfVirtual = ({ stages }: Pick<Pipeline, "stages">, v: number): number => Math.floor(v / stages);

/** The layers of a virtual stage: the first, and one past the last; where it has none, both are where they would be. */
export function layersOf({ of }: Pipeline, { model }: Pick<Job, "model">, v: number): [number, number] {
  const layer = (p: number) => Math.max(0, Math.min(model.layers, p - 1));
  const first = of.findIndex((at) => at >= v);
  const after = of.findIndex((at) => at > v);
  return [layer(first < 0 ? of.length : first), layer(after < 0 ? of.length : after)];
}

/**
 * Reads `Et|(tt|)*3tL` as Megatron Core's layouts are written: E the embedding, t a layer, m one of multi-token prediction, L the
 * head and the loss, | between virtual stages, ( ) a group, *n what stands before it n times. Returns the letters of each virtual
 * stage, or what is wrong.
 */
export function readLayout(text: string): string[] | string {
  let at = 0;
  const wrong = (what: string): string => `${what} at character ${at + 1}`;
  let problem: string | undefined;
  const sequence = (inside: boolean): string => {
    let out = "";
    while (at < text.length && problem === undefined) {
      const c = text[at]!;
      let piece: string;
      if (c === " ") {
        at++;
        continue;
      }
      if (c === "(") {
        at++;
        piece = sequence(true);
        if (text[at] !== ")") problem ??= wrong("a group is not closed");
        at++;
      } else if (c === ")") {
        if (!inside) problem = wrong("a group is closed that was not opened");
        return out;
      } else if ("Etm|L".includes(c)) {
        piece = c;
        at++;
      } else {
        problem = wrong(`${JSON.stringify(c)} means nothing: E, t, m, L, |, ( ) and *n do`);
        return out;
      }
      const times = /^\*(\d{1,6})/.exec(text.slice(at));
      if (times) at += times[0].length;
      else if (text[at] === "*") problem ??= wrong("a number must follow *");
      out += piece.repeat(times ? Number(times[1]) : 1);
      if (out.length > 1e6) problem ??= wrong("the layout is longer than any model");
    }
    return out;
  };
  const all = sequence(false);
  if (problem !== undefined) return problem;
  const flat = all.replaceAll("|", "");
  if (!/^Et*m*L$/.test(flat))
    return `it places ${flat.length > 20 ? `${flat.slice(0, 20)}…` : flat || "nothing"}: the embedding E comes first, then the layers t, then those of multi-token prediction m, then the head L, each of E and L once`;
  return all.split("|");
}
