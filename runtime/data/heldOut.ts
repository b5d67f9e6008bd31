/**
 * The data that evaluations read. An evaluation reads the same samples each time, so its losses can be compared over a run: the first
 * samples of the blend, or with `all` the whole data once, source after source, in the order of the files.
 */
import type { Job } from "../../schemas/job.ts";
import { type Batch, batchesFrom, type Reading } from "../train/inputs.ts";
import { countOf } from "../train/tokenWeights.ts";
import { blendOf } from "./blend.ts";
import { documentsOfSources } from "./documents.ts";
import { IGNORED } from "./tokens.ts";

/** A source of held-out data. */
export interface HeldOutSource {
  readonly name: string;
  readonly weight: number;
  /** The token that ends a document, if the description of the data names one. */
  readonly end?: number | undefined;
  /** Fills a window of seq + 1 tokens with sample n of an endless run. */
  sample(n: number, window: Int32Array): void;
  /** The number of samples that hold each token once. */
  readonly once: number;
  /** Fills the window with sample n of those. Returns the number of tokens that it has, seq + 1 unless it is the last. */
  whole(n: number, window: Int32Array): number;
}

/** The inputs of an evaluation: those of a batch, the weight of each token, and the number of its source. */
export type EvaluationBatch = Batch & { readonly weights: Float32Array; readonly sources: Int32Array };

/** The samples of one evaluation. */
export interface HeldOut {
  /** The names of the sources. */
  readonly names: readonly string[];
  readonly samples: number;
  /** Returns the samples from `first` on; those beyond the last have no labels. The weights of the labels add up to 1. */
  batch(first: number, rows: number): EvaluationBatch;
}

/** Returns the samples of an evaluation of these sources. */
export function heldOutOf(
  sources: readonly HeldOutSource[],
  steps: NonNullable<Job["train"]["evaluation"]>["steps"],
  given: Reading,
): HeldOut {
  const reading = { ...given, weighed: false, depths: 0, documents: documentsOfSources(given.documents, sources) };
  const { seq, batch: size } = reading;
  const ends: number[] = [];
  for (const { once } of sources) ends.push((ends.at(-1) ?? 0) + once);
  const samples = steps === "all" ? (ends.at(-1) ?? 0) : steps * size;
  const blend = blendOf(sources.map(({ weight }) => weight));
  const placeOf = (n: number): { source: number; index: number } => {
    if (steps !== "all") return blend(n);
    const source = ends.findIndex((end) => n < end);
    return { source, index: n - (ends[source - 1] ?? 0) };
  };
  const read = batchesFrom(reading, ({ first, row }, window) => {
    const n = first + row;
    if (n >= samples) {
      window.fill(0);
      return (labels) => void labels.fill(IGNORED);
    }
    const { source, index } = placeOf(n);
    const own = sources[source];
    if (!own) throw new Error(`rankc: an evaluation has no source ${source}`);
    if (steps !== "all") {
      own.sample(index, window);
      return undefined;
    }
    const count = own.whole(index, window);
    window.fill(0, count);
    return (labels) => {
      for (let i = 0; i < seq; i++) labels[i] = i + 1 < count ? (window[i + 1] ?? IGNORED) : IGNORED;
    };
  });
  return {
    names: sources.map(({ name }) => name),
    samples,
    batch(first, rows) {
      const batch = read(first, rows);
      const weight = 1 / Math.max(1, countOf(batch.labels));
      const numbers = new Int32Array(rows * seq);
      for (let row = 0; row < rows && first + row < samples; row++) numbers.fill(placeOf(first + row).source, row * seq, (row + 1) * seq);
      return { ...batch, weights: Float32Array.from(batch.labels, (label) => (label === IGNORED ? 0 : weight)), sources: numbers };
    },
  };
}
