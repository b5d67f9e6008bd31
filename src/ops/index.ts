/** The op table: every op by its name. */
import type { OpName } from "../../schemas/opNames.ts";
import { attention, attentionGrad, attentionMerge, attentionPart, attentionPartGrad } from "./attention.ts";
import * as documents from "./attentionDocuments.ts";
import { attentionDropout, attentionDropoutGrad, attentionDropoutPart, attentionDropoutPartGrad } from "./attentionDropout.ts";
import * as balance from "./balance.ts";
import * as capacity from "./capacity.ts";
import * as dispatch from "./dispatch.ts";
import { dropout, jitter } from "./dropout.ts";
import * as fused from "./fused.ts";
import { gatedUnits } from "./gatedUnits.ts";
import {
  accumulate,
  add,
  addBias,
  addBiasRows,
  biasGrad,
  biasRowsGrad,
  cast,
  gemm,
  gemmDgrad,
  gemmWgrad,
  groupedDgrad,
  groupedGemm,
  groupedWgrad,
} from "./gemm.ts";
import { join, latentKv, latentKvGrad, split } from "./latent.ts";
import * as moe from "./moe.ts";
import * as norm from "./norm.ts";
import type { AnyFormulaOp, AnyOp } from "./op.ts";
import * as optimizer from "./optimizer.ts";
import * as messages from "./rearrange.ts";
import { rope, ropeDocuments } from "./rope.ts";
import * as router from "./router.ts";
import { ungatedUnits } from "./ungatedUnits.ts";
import * as vocab from "./vocab.ts";

const all = [
  ...[gemm, gemmDgrad, gemmWgrad, groupedGemm, groupedDgrad, groupedWgrad],
  ...[add, accumulate, cast, addBias, biasGrad, addBiasRows, biasRowsGrad],
  ...Object.values(norm),
  ...[rope, ropeDocuments, attention, attentionGrad, attentionPart, attentionPartGrad, attentionMerge],
  ...[attentionDropout, attentionDropoutGrad, attentionDropoutPart, attentionDropoutPartGrad, dropout, jitter],
  ...Object.values(documents),
  ...[split, join, latentKv, latentKvGrad],
  ...Object.values(vocab),
  ...Object.values(router),
  ...Object.values(balance),
  ...Object.values(capacity),
  ...Object.values(moe),
  ...Object.values(dispatch),
  ...Object.values(gatedUnits).flatMap(({ dense, denseGrad, rows, rowsGrad }) => [dense, denseGrad, rows, rowsGrad]),
  ...Object.values(ungatedUnits).flatMap(({ dense, denseGrad, rows, rowsGrad }) => [dense, denseGrad, rows, rowsGrad]),
  ...Object.values(optimizer),
  ...Object.values(fused),
  ...[messages.arrange, messages.takeRows, messages.invertRows, messages.splitRows, messages.mergeRows],
];
/** Maps ops by their names. */
const byName = <O extends AnyOp>(table: readonly O[]) =>
  Object.fromEntries(table.map((o) => [o.name, o])) as { readonly [N in O["name"]]: Extract<O, { readonly name: N }> };

/** Every op by its name. An op that `OpName` lists and no file declares does not compile. */
export const ops: Readonly<Record<OpName, AnyOp>> = byName(all) satisfies Record<OpName, AnyOp>;

/** The name of an op that stands for several instructions of a program. */
export type FusedOpName = (typeof fused)[keyof typeof fused]["name"];

/** The name of an op whose reference and kernels are derived from its formula. */
export type FormulaOpName = Extract<(typeof all)[number], AnyFormulaOp>["name"];
const formulaOps = all.filter((o) => "formula" in o);
/** Returns whether reference and kernels of an op are derived from its formula. */
export const isFormulaOp = (op: AnyOp): boolean => "formula" in op;
/** Returns a value for each op with a formula, by the name of the op. */
export const mapFormulaOps = <T>(of: (op: AnyFormulaOp) => T): Readonly<Record<FormulaOpName, T>> =>
  Object.fromEntries(formulaOps.map((o) => [o.name, of(o)])) as Record<FormulaOpName, T>;
