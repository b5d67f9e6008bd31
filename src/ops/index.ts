/** The op table: every op by its name. */
import { attention, attentionGrad, attentionMerge, attentionPart, attentionPartGrad } from "./attention.ts";
import { attentionDropout, attentionDropoutGrad, attentionDropoutPart, attentionDropoutPartGrad } from "./attentionDropout.ts";
import * as balance from "./balance.ts";
import * as capacity from "./capacity.ts";
import { dropout, jitter } from "./dropout.ts";
import { gatedUnits } from "./gatedUnits.ts";
import { join, latentKv, latentKvGrad, split } from "./latent.ts";
import { accumulate, add, addBias, biasGrad, cast, gemm, gemmDgrad, gemmWgrad, groupedDgrad, groupedGemm, groupedWgrad } from "./linear.ts";
import * as moe from "./moe.ts";
import { headNorm, headNormGrad, rmsnorm, rmsnormGrad } from "./norm.ts";
import type { AnyOp } from "./op.ts";
import * as optimizer from "./optimizer.ts";
import { rope } from "./rope.ts";
import * as router from "./router.ts";
import * as messages from "./transport.ts";
import * as vocab from "./vocab.ts";

const all: readonly AnyOp[] = [
  ...[gemm, gemmDgrad, gemmWgrad, groupedGemm, groupedDgrad, groupedWgrad, add, accumulate, cast, addBias, biasGrad],
  ...[rmsnorm, rmsnormGrad, headNorm, headNormGrad],
  ...[rope, attention, attentionGrad, attentionPart, attentionPartGrad, attentionMerge],
  ...[attentionDropout, attentionDropoutGrad, attentionDropoutPart, attentionDropoutPartGrad, dropout, jitter],
  ...[split, join, latentKv, latentKvGrad],
  ...Object.values(vocab),
  ...Object.values(router),
  ...Object.values(balance),
  ...Object.values(capacity),
  ...Object.values(moe),
  ...Object.values(gatedUnits).flatMap(({ dense, denseGrad, rows, rowsGrad }): readonly AnyOp[] => [dense, denseGrad, rows, rowsGrad]),
  ...Object.values(optimizer),
  ...[messages.arrange, messages.takeRows, messages.invertRows, messages.splitRows, messages.mergeRows],
];
export const ops: Readonly<Record<string, AnyOp>> = Object.fromEntries(all.map((o) => [o.name, o]));
