/**
 * Batches of a corpus: ids [rows, seq], their labels, and the other inputs of a plan that derive from them. A batch is a function of the
 * number of sequences read before it, and of its size. The corpus may be on a disk or in memory.
 */
import type { Job } from "../../schemas/job.ts";
import { hasTokenWeights } from "../../schemas/lossWeights.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { HostData } from "../backend.ts";
import { type Crossing, type DocumentReading, documentsOf } from "../data/documents.ts";
import { splitBounds } from "../data/gptDataset.ts";
import { readIndex } from "../data/megatronIndex.ts";
import { permutation } from "../data/permutation.ts";
import { IGNORED, idsOf, labelsOf, type Text, type Tokens, type Written } from "../data/tokens.ts";
import { countOf, shiftLeft, type Weighting, weightsOf } from "./tokenWeights.ts";

/** The texts of a corpus. Without `labels` the tokens themselves are the labels. `index`: the index of a Megatron data set. */
export interface Corpus {
  readonly ids: Text;
  readonly index?: Text | undefined;
  readonly labels?: Text | undefined;
}
/** How a job reads its corpus. */
export interface Reading extends Written {
  readonly seq: number;
  readonly batch: number;
  readonly order: "sequential" | "shuffled";
  readonly seed: number;
  /** Whether the plan has token weights as inputs. Without labels every token counts. */
  readonly weighed: boolean;
  readonly weighting: Weighting;
  /** Depths of multi-token prediction. */
  readonly depths: number;
  /** Shares of training, validation and test; default: all tokens are of training. */
  readonly split?: readonly number[] | undefined;
  /** The batches of an evaluation. */
  readonly evaluates?: number | "all" | undefined;
  /** With it, documents that share a sequence are kept apart. */
  readonly documents?: DocumentReading | undefined;
}
/**
 * Inputs of a plan by name: one value per token of the step, or one value. `weights` and `aux_weight` (the weight of balancing and z
 * losses) exist if the plan has them, and `documents` if the job keeps documents apart; depth k of multi-token prediction has `ids_k`, `labels_k` and `weights_k`. The weights of a batch
 * below the full size are scaled by batch / full batch, like the losses of a plan without weights.
 */
export type Batch = Readonly<Record<string, HostData>> & { readonly ids: Int32Array; readonly labels: Int32Array };
/** Returns the `rows` sequences after the first `first` of a run. */
export type BatchOf = (first: number, rows: number) => Batch;

/** Opens a corpus for batches. Throws a Trouble if the corpus is too short, or does not have the format of `reading`. */
export function batchesOf(corpus: Corpus, reading: Reading): BatchOf {
  const { vocab } = reading;
  const all = tokensOf(corpus, reading);
  const tokens = reading.split ? { ...all, count: splitBounds(reading.split, all.count)[1] ?? all.count } : all;
  check(tokens, reading);
  const marks = corpus.labels && labelsOf(corpus.labels, tokens, vocab);
  const startOf = orders[reading.order](tokens.count, reading);
  return batchesFrom(reading, (sample, window) => {
    // the row of a step, because the sequential order wraps by whole batches
    const start = startOf(sample.first, sample.row);
    tokens.read(window, start);
    // labels are aligned with their tokens; a token predicts the label of the next token
    return marks && ((labels: Int32Array) => marks.read(labels, start + 1));
  });
}

/** Returns the tokens of a corpus. */
export const tokensOf = (corpus: Corpus, reading: Reading): Tokens => idsOf(corpus.ids, reading, corpus.index && readIndex(corpus.index));

/** A sample of a step: the sequences read before the step, and its row. */
export interface SampleAt {
  readonly first: number;
  readonly row: number;
}

/**
 * Returns the batches of samples that `read` fetches: it fills a window of seq + 1 tokens, and may return a function that fills the labels
 * of the sample; without one the labels are the next tokens.
 */
export function batchesFrom(
  reading: Reading,
  read: (sample: SampleAt, window: Int32Array) => ((labels: Int32Array) => void) | undefined,
): BatchOf {
  const { seq } = reading;
  return (first, rows) => {
    const ids = new Int32Array(rows * seq);
    const labels = new Int32Array(rows * seq);
    const window = new Int32Array(seq + 1);
    for (let row = 0; row < rows; row++) {
      const own = read({ first, row }, window);
      ids.set(window.subarray(0, seq), row * seq);
      if (own) own(labels.subarray(row * seq, (row + 1) * seq));
      else labels.set(window.subarray(1), row * seq);
    }
    const share = rows / reading.batch;
    const { documents, crosses } = reading.documents ? documentsOf(ids, seq, reading.documents) : { crosses: () => false };
    for (const i of labels.keys()) if (crosses(i, 1)) labels[i] = IGNORED;
    const more = further({ ids, labels, crosses }, reading, share);
    return { ids, labels, ...(documents && { documents }), ...weightsIn(labels, reading, share), ...more };
  };
}

/**
 * Returns `weights` and `aux_weight`. With loss_weighting `token`, Megatron Core multiplies each balancing loss by its number of tokens,
 * labelled or not, and divides the sum by the number of labels. A step without labels has weight 0, because its balancing losses would be
 * the whole gradient.
 */
function weightsIn(labels: Int32Array, { weighed, weighting }: Reading, share: number): Readonly<Record<string, HostData>> {
  if (!weighed) return {};
  const learnt = countOf(labels);
  const each = weighting.by === "token" ? labels.length / Math.max(1, learnt) : 1;
  return { weights: weightsOf(labels, weighting, share), aux_weight: Float32Array.of(learnt > 0 ? each : 0) };
}

/**
 * Returns the inputs of multi-token prediction. All depths together have the weight of one loss. With `token`, all labels of a depth have
 * equal weights; Megatron Core averages a depth over each microbatch first, which is equal if no label is ignored.
 */
function further(
  { ids, labels, crosses }: { readonly ids: Int32Array; readonly labels: Int32Array; readonly crosses: Crossing },
  reading: Reading,
  share: number,
): Readonly<Record<string, HostData>> {
  const { seq, depths, weighting } = reading;
  const inputs: Record<string, HostData> = {};
  for (let k = 1; k <= depths; k++) {
    const own = shiftLeft(labels, seq, k, IGNORED);
    for (const i of own.keys()) if (crosses(i, k + 1)) own[i] = IGNORED;
    Object.assign(inputs, { [`ids_${k}`]: shiftLeft(ids, seq, k, 0), [`labels_${k}`]: own });
    inputs[`weights_${k}`] = weightsOf(own, weighting, share / depths);
  }
  return inputs;
}

/** Returns the start of a row in the corpus; `first`: the sequences read before the step. */
type Order = (count: number, reading: Reading) => (first: number, row: number) => number;

const orders: Readonly<Record<Reading["order"], Order>> = {
  sequential:
    (count, { seq, batch }) =>
    (first, row) =>
      ((first * seq) % (count - batch * (seq + 1) - 1)) + row * seq,
  // Contiguous windows of seq tokens; each epoch visits all of them in its own random order.
  shuffled: (count, { seq, seed }) => {
    const windows = Math.floor((count - 1) / seq);
    let epoch = -1;
    let order = new Uint32Array();
    return (first, row) => {
      const sample = first + row;
      const wanted = Math.floor(sample / windows);
      if (wanted !== epoch) order = permutation(windows, seed, "data.order", (epoch = wanted));
      return order[sample % windows]! * seq;
    };
  },
};

function check(tokens: Tokens, { seq, batch, split }: Reading): void {
  // One token more than the sequential rule reads: its modulus must be at least 1
  const needed = batch * (seq + 1) + 2;
  if (tokens.count >= needed) return;
  throw new Trouble(
    `${tokens.path}: ${split ? "the training share of data.split" : "the corpus"} has ${tokens.count} ${tokens.unit}; a batch of ${batch} rows of ${seq} needs at least ${needed}`,
    "use a longer corpus, or lower train.global_batch or model.seq",
  );
}

/** Returns how a job weights the losses of tokens. */
export const weightingOf = ({ train, model }: Pick<Job, "train" | "model">): Weighting => ({
  by: train.loss_weighting,
  together: train.micro_batch * model.seq,
});

/** Returns how a job reads its corpus. */
export const readingOf = ({ train, model, data }: Job): Reading => ({
  ...{ seq: model.seq, batch: train.global_batch, vocab: model.vocab, seed: train.seed },
  ...{ format: data.format, dtype: data.dtype, order: data.order },
  weighed: hasTokenWeights({ data }),
  documents: data.documents && { end: data.documents.end, loss: data.documents.loss },
  weighting: weightingOf({ train, model }),
  depths: model.mtp?.layers ?? 0,
  split: data.split,
  evaluates: train.evaluation?.steps,
});
