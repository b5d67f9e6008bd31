/**
 * Causal grouped-query attention and its gradient, to all keys or to a shard of them. A workgroup has a block of rows (queries or keys) and
 * iterates over all columns (keys or queries) that the block attends to, 32 or 64 at a time, so that no matrix of scores is in memory. The
 * forward pass and dq iterate over keys; dk and dv iterate over the queries of every query head that reads the keys. Each pass recomputes
 * the scores.
 */
import { render } from "../../../templates/bindings.ts";
import * as attentionOps from "../../ops/attention.ts";
import * as documentOps from "../../ops/attentionDocuments.ts";
import * as dropoutOps from "../../ops/attentionDropout.ts";
import { attentionVariant } from "../../ops/attentionVariants.ts";
import { runtimeAttrs } from "../../ops/dropout.ts";
import { invariant } from "../../ops/op.ts";
import { type AttentionGradSpec, type AttentionSizes, type AttentionSpec, attentionSizes, isReordered } from "../attentionSizes.ts";
import { type GeneratedKernel, type KernelOperand, type KernelSpec, operandOf, wgslKernel } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import {
  type AttentionTiling,
  type AttentionVectors,
  indexInShard,
  loaderOf,
  type Pass,
  passText,
  randomText,
  stepOf,
  workgroupsOf,
  writerOf,
} from "./attentionText.ts";
import { type Binding, bindingOf, bound, type EntryPoint, float, foldGrid, header, scratchBytes } from "./text.ts";

/** WGSL kernels of attention. */
export const attention = {
  attention: wgslKernel(attentionOps.attention, (spec) => forward(spec)),
  attention_part: wgslKernel(attentionOps.attentionPart, (spec) => forward(spec)),
  attention_dropout: wgslKernel(dropoutOps.attentionDropout, (spec) => forward(spec, [sampleOf(spec)])),
  attention_dropout_part: wgslKernel(dropoutOps.attentionDropoutPart, (spec) => forward(spec, [sampleOf(spec)])),
  attention_documents: wgslKernel(documentOps.attentionDocuments, (spec) => forward(spec, [documentsOf(spec)])),
  attention_documents_part: wgslKernel(documentOps.attentionDocumentsPart, (spec) => forward(spec, [documentsOf(spec)])),
  attention_dropout_documents: wgslKernel(documentOps.attentionDropoutDocuments, (spec) =>
    forward(spec, [sampleOf(spec), documentsOf(spec)]),
  ),
  attention_dropout_documents_part: wgslKernel(documentOps.attentionDropoutDocumentsPart, (spec) =>
    forward(spec, [sampleOf(spec), documentsOf(spec)]),
  ),
  attention_grad: wgslKernel(attentionOps.attentionGrad, (spec) => backward(spec)),
  attention_part_grad: wgslKernel(attentionOps.attentionPartGrad, (spec) => backward(spec)),
  attention_dropout_grad: wgslKernel(dropoutOps.attentionDropoutGrad, (spec) => backward(spec, [sampleOf(spec)])),
  attention_dropout_part_grad: wgslKernel(dropoutOps.attentionDropoutPartGrad, (spec) => backward(spec, [sampleOf(spec)])),
  attention_documents_grad: wgslKernel(documentOps.attentionDocumentsGrad, (spec) => backward(spec, [documentsOf(spec)])),
  attention_documents_part_grad: wgslKernel(documentOps.attentionDocumentsPartGrad, (spec) => backward(spec, [documentsOf(spec)])),
  attention_dropout_documents_grad: wgslKernel(documentOps.attentionDropoutDocumentsGrad, (spec) =>
    backward(spec, [sampleOf(spec), documentsOf(spec)]),
  ),
  attention_dropout_documents_part_grad: wgslKernel(documentOps.attentionDropoutDocumentsPartGrad, (spec) =>
    backward(spec, [sampleOf(spec), documentsOf(spec)]),
  ),
};

const sampleOf = (spec: KernelSpec<"sample">): Binding => bindingOf(operandOf(spec, "sample"));
const documentsOf = (spec: KernelSpec<"documents">): Binding => bindingOf(operandOf(spec, "documents"));

const DOT_THREADS = 128;
/** The largest number of channels of scores in workgroup memory: with 64 rows and 32 columns, 6 KiB beside 8 KiB of weights. */
const STEP = 16;

/** Returns the vectors of an operand, each of `channels` channels for one head of a query or a key. */
const vectorsOf = (o: KernelOperand, channels: number, side: AttentionVectors["side"]): AttentionVectors => ({
  ...o,
  ...{ channels, side, words: Math.ceil(channels / 4), run: channels % 4 === 0 ? 4 : 1 },
});
const bufferOf = (v: AttentionVectors): Binding => bindingOf(v, v.run);
/** The log-sum-exps. Those of a shard are bound as bits: WGSL has no number for that of a query without keys. */
const logSums = (spec: KernelSpec): Binding => ({ arg: "lse", type: isForwardOfShard(spec) ? "u32" : "f32" });
const isForwardOfShard = ({ op }: KernelSpec): boolean => {
  const { part = false, grad = false } = attentionVariant(op) ?? {};
  return part && !grad;
};

/** `more`: the inputs of variants. */
function forward(spec: AttentionSpec, more: readonly Binding[] = []): GeneratedKernel {
  const { C, W } = spec.d;
  const [q, k, v, o] = [
    vectorsOf(operandOf(spec, "q"), C, "queries"),
    vectorsOf(operandOf(spec, "k"), C, "keys"),
    vectorsOf(operandOf(spec, "v"), W, "keys"),
    vectorsOf(operandOf(spec, "o"), W, "queries"),
  ];
  const pass: Pass = {
    ...{ entry: spec.name, rows: "queries", scores: [{ name: "s", row: q, column: k }], sums: [{ name: "s", column: v, to: o }] },
    ...{ buffers: [...[q, k, v].map(bufferOf), ...more, bufferOf(o), logSums(spec)], start: "start" },
  };
  return generate(spec, { inputs: [q, k, v], passes: [pass] });
}

function backward(spec: AttentionGradSpec, more: readonly Binding[] = []): GeneratedKernel {
  const { C, W } = spec.d;
  const [q, k, v, o, dy] = [
    vectorsOf(operandOf(spec, "q"), C, "queries"),
    vectorsOf(operandOf(spec, "k"), C, "keys"),
    vectorsOf(operandOf(spec, "v"), W, "keys"),
    vectorsOf(operandOf(spec, "o"), W, "queries"),
    vectorsOf(operandOf(spec, "dy"), W, "queries"),
  ];
  const [dq, dk, dv] = [
    vectorsOf(operandOf(spec, "dq"), C, "queries"),
    vectorsOf(operandOf(spec, "dk"), C, "keys"),
    vectorsOf(operandOf(spec, "dv"), W, "keys"),
  ];
  const reads: Binding[] = [...[dy, q, k, v].map(bufferOf), logSums(spec), { arg: scratchStart, name: "dots", type: "f32" }];
  const overKeys: Pass = {
    ...{ entry: `${spec.name}_dq`, rows: "queries", start: "start", buffers: [...reads, bufferOf(dq)] },
    scores: [
      { name: "s", row: q, column: k },
      { name: "w", row: dy, column: v },
    ],
    sums: [{ name: "w", column: k, to: dq }],
  };
  const overQueries: Pass = {
    ...{ entry: `${spec.name}_dkv`, rows: "keys", start: "start_keys", buffers: [...reads, bufferOf(dk), bufferOf(dv)] },
    scores: [
      { name: "s", row: k, column: q },
      { name: "w", row: v, column: dy },
    ],
    sums: [
      { name: "s", column: dy, to: dv },
      { name: "w", column: q, to: dk },
    ],
  };
  const dots = [bufferOf(dy), bufferOf(o), { arg: scratchStart, name: "dots_out", type: "f32" }, ...more];
  return generate(spec, { inputs: [q, k, v, o, dy], passes: [overKeys, overQueries], dots });
}

/** Returns the rows of a block and its threads along columns: 4 x 4 scores per thread, and at most 64 sums of each kind up to a width of 256. */
function blockOf({ B, S, U, G, M, C, W }: AttentionSizes): { rows: number; across: number } {
  const across = Math.max(C, W) > 128 ? 16 : 8;
  // with fewer rows the columns are read more often; with more rows fewer blocks run at once
  const blocks = (rows: number) => B * G * Math.min(M * Math.ceil(S / rows), Math.ceil(U / rows));
  const rows = [64, 32].find((r) => r * across <= 512 && Math.max(S, U) > r / 2 && blocks(r) >= 128);
  return { rows: rows ?? (Math.max(S, U) > 16 ? 32 : 16), across };
}

/** Returns the tiles that all passes of a kernel use. */
function tilingOf(sizes: AttentionSizes, passes: readonly Pass[]): AttentionTiling {
  const { rows, across } = blockOf(sizes);
  const threads = (rows / 4) * across;
  const stageWords = Math.max(
    threads,
    ...passes.flatMap((p) => p.scores).map((s) => stepOf(s.row, STEP) * (rows / 4 + across)),
    ...passes.flatMap((p) => p.sums).map((s) => s.column.words),
  );
  return { rows, across, columns: across * 4, threads, stageWords, step: STEP };
}

/** The passes of a kernel and the operands that they read; `dots` are the buffers of the entry that computes o·dy for the gradient. */
interface Plan {
  readonly inputs: readonly AttentionVectors[];
  readonly passes: readonly Pass[];
  readonly dots?: readonly Binding[];
}

function generate(spec: AttentionSpec | AttentionGradSpec, { inputs, passes, dots }: Plan): GeneratedKernel {
  const sizes = attentionSizes(spec);
  const { B, S, U, G, M, part, drops, documents } = sizes;
  invariant(spec.accumulates.size === 0, `${spec.op} cannot accumulate into its outputs`);
  const tiling = tilingOf(sizes, passes);
  const { threads } = tiling;
  const reordered = isReordered(sizes, S) || isReordered(sizes, U);
  const starts = [...(part ? ["S", "U"] : ["S"]), ...(drops ? ["G"] : [])];
  const attrs = drops ? runtimeAttrs : [];
  const count = B * S * G * M;
  const main = passes.map((p): EntryPoint => {
    const { entry, buffers, start } = p;
    return { entry, grid: workgroupsOf(p, sizes, tiling), threads, buffers, starts, attrs, uniform: start };
  });
  const dotGroups = Math.ceil(count / DOT_THREADS);
  const dotEntries: EntryPoint[] = dots
    ? [
        {
          ...{ entry: `${spec.name}_dots`, grid: dotGroups, threads: DOT_THREADS, buffers: dots },
          ...(reordered ? { starts, uniform: "start_dots" } : {}),
        },
      ]
    : [];
  const { bindings, launches } = bound([...dotEntries, ...main]);
  const documentsAt = count + (drops ? 2 * B : 0);
  const source = render("wgsl/attention.wgsl", {
    ...{ header: header(spec.dtype), bindings, name: spec.name, gradient: sizes.grad, part, moved: reordered },
    ...{
      drops: drops !== undefined,
      random: drops ? randomText(sizes, drops, tiling) : "",
      batches: B,
      mask: maskText(sizes, documentsAt),
    },
    ...{ blind: part || documents, documents, documentCount: B * S, documentsAt },
    ...{ threads, rows: tiling.rows, columns: tiling.columns, across: tiling.across, stageWords: tiling.stageWords },
    ...{ weightWords: (tiling.columns * tiling.rows) / 4, rowWords: tiling.rows / 4 },
    ...{ queries: S, queryHeads: G * M, headsOfSequence: S * G * M, queryPlace: indexInShard(sizes, "queries"), scale: float(sizes.scale) },
    ...{ dotThreads: DOT_THREADS, dotIndex: foldGrid(dotGroups).index, dotCount: count, valueChannels: sizes.W },
    loaders: inputs.map((v) => loaderOf(v, sizes)),
    writers: passes.flatMap((p) => p.sums).map(({ to }) => writerOf(to, sizes)),
    passes: passes.map((p) => passText(p, sizes, tiling)),
  });
  return { source, launches, ...(sizes.grad ? { scratch: scratchBytes(documentsAt + (documents ? B * S : 0)) } : {}) };
}

/** `documentsAt`: where the gradient reads documents in scratch, because the number of buffers is limited. */
function maskText(sizes: AttentionSizes, documentsAt: number): string {
  const { S, U, part, chunk, ranks, documents, grad } = sizes;
  const place = isReordered(sizes, S) ? `place_in(starts.x, ${S}, at)` : "at";
  return render("wgsl/attention_mask.wgsl", {
    ...{ zigzag: chunk > 0, chunk, ranks, blocks: 2 * ranks, lastBlock: 2 * ranks - 1, queries: S, keys: U },
    ...{ keyStart: part ? "starts.y" : "0", documents },
    document: grad ? `dots[${documentsAt}u + batch * ${S}u + ${place}]` : `documents[batch * ${S}u + ${place}]`,
  });
}
