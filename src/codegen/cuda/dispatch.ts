/** Kernels of dispatch once per rank: rows that carry the weights of a group of experts, and lists of such rows on the rank of the group. */
import { cudaType } from "../../../schemas/dtypes.ts";
import { render } from "../../../templates/bindings.ts";
import {
  packGroups,
  packGroupsGrad,
  packRowGroups,
  packRowGroupsGrad,
  packRows,
  packRowsGrad,
  permuteRows,
  rowChoices,
  unpermuteRows,
} from "../../ops/dispatch.ts";
import { cudaKernel, type GeneratedKernel, groupsOfList, listAsTokens, operandOf, type SpecOf } from "../kernelSpec.ts";
import { rowIndex } from "../launchArgs.ts";
import { join, makeRows, perRow, rowKernels } from "./moe.ts";
import { clearBuffer } from "./reduce.ts";
import { source } from "./text.ts";

function packOfGroups(spec: SpecOf<typeof packGroups>): GeneratedKernel {
  const [from, to] = [operandOf(spec, "p"), operandOf(spec, "r")];
  const copies = perRow(spec, { what: "the values of the group of each row", from, to, target: "row", origin: "cell" }, spec.d.K);
  return join(spec, ...(spec.makesRows ? [makeRows(spec, false)] : []), copies);
}

function packOfGroupsGrad(spec: SpecOf<typeof packGroupsGrad>): GeneratedKernel {
  const [from, to] = [operandOf(spec, "dy"), operandOf(spec, "dp")];
  const { body, launch } = clearBuffer(spec, to);
  const what = "the gradients of the values of each group with a row; the others are zero";
  return join(spec, { body, launches: [launch] }, perRow(spec, { what, from, to, target: "cell", origin: "row" }, spec.d.K));
}

function choicesOfRows(spec: SpecOf<typeof rowChoices>): GeneratedKernel {
  const [from, to] = [operandOf(spec, "v"), operandOf(spec, "c")];
  const types = { from: cudaType(from.dtype), to: cudaType(to.dtype) };
  const body = render("cuda/row_choices.cu", { name: spec.name, ...types, count: to.size, width: spec.d.N, group: spec.d.K });
  const grid: [number, number, number] = [Math.ceil(to.size / 256), 1, 1];
  return {
    source: source(spec, body),
    launches: [{ entry: spec.name, grid, threads: 256, shared: 0, args: [rowIndex, from.name, to.name] }],
  };
}

/** CUDA kernels of dispatch once per rank. */
export const dispatch = {
  pack_groups: cudaKernel(packGroups, packOfGroups),
  pack_groups_grad: cudaKernel(packGroupsGrad, packOfGroupsGrad),
  row_choices: cudaKernel(rowChoices, choicesOfRows),
  pack_row_groups: cudaKernel(packRowGroups, (spec) => packOfGroups(groupsOfList(spec))),
  pack_row_groups_grad: cudaKernel(packRowGroupsGrad, (spec) => packOfGroupsGrad(groupsOfList(spec))),
  permute_rows: cudaKernel(permuteRows, (spec) => rowKernels.permute(listAsTokens(spec))),
  unpermute_rows: cudaKernel(unpermuteRows, (spec) => rowKernels.unpermute(listAsTokens(spec))),
  pack_rows: cudaKernel(packRows, (spec) => rowKernels.pack(listAsTokens(spec))),
  pack_rows_grad: cudaKernel(packRowsGrad, (spec) => rowKernels.packGrad(listAsTokens(spec))),
};
