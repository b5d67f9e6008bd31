/** Kernels of dispatch once per rank: rows that carry the weights of a group of experts, and lists of such rows on the rank of the group. */
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
import { type GeneratedKernel, groupsOfList, listAsTokens, operandOf, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import { eachRow, fill, joined, rowKernels, withRows } from "./moe.ts";
import { bindingOf, scalar } from "./text.ts";

function packOfGroups(spec: SpecOf<typeof packGroups>): GeneratedKernel {
  const [p, r, K] = [operandOf(spec, "p"), operandOf(spec, "r"), spec.d.K];
  const line = `r[i] = ${scalar(r.dtype)}(p[choice * ${K}u + i % ${K}u]);`;
  return withRows(spec, eachRow(spec, { vectors: K, line, buffers: [bindingOf(p), bindingOf(r)] }));
}

function packOfGroupsGrad(spec: SpecOf<typeof packGroupsGrad>): GeneratedKernel {
  const [dy, dp, K] = [operandOf(spec, "dy"), operandOf(spec, "dp"), spec.d.K];
  const type = scalar(dp.dtype);
  const line = `dp[choice * ${K}u + i % ${K}u] = ${type}(dy[i]);`;
  const copies = eachRow(spec, { vectors: K, line, buffers: [bindingOf(dy), bindingOf(dp)] });
  return joined(spec, [fill(`${spec.name}_clear`, { arg: "dp", name: "cleared", type }, dp.size, "0.0"), copies]);
}

function choicesOfRows(spec: SpecOf<typeof rowChoices>): GeneratedKernel {
  const [v, c] = [operandOf(spec, "v"), operandOf(spec, "c")];
  const [type, K] = [scalar(c.dtype), spec.d.K];
  const line = `for (var j = 0u; j < ${K}u; j++) { if (v[i * ${K}u + j] >= 0.0) { c[i] = ${type}(1.0); } }`;
  const marks = eachRow(spec, { vectors: spec.d.N, line, buffers: [bindingOf(v), bindingOf(c)] });
  return joined(spec, [fill(`${spec.name}_clear`, { arg: "c", name: "cleared", type }, c.size, "0.0"), marks]);
}

/** WGSL kernels of dispatch once per rank. */
export const dispatch = {
  pack_groups: wgslKernel(packGroups, packOfGroups),
  pack_groups_grad: wgslKernel(packGroupsGrad, packOfGroupsGrad),
  row_choices: wgslKernel(rowChoices, choicesOfRows),
  pack_row_groups: wgslKernel(packRowGroups, (spec) => packOfGroups(groupsOfList(spec))),
  pack_row_groups_grad: wgslKernel(packRowGroupsGrad, (spec) => packOfGroupsGrad(groupsOfList(spec))),
  permute_rows: wgslKernel(permuteRows, (spec) => rowKernels.copyToRows(listAsTokens(spec))),
  unpermute_rows: wgslKernel(unpermuteRows, (spec) => rowKernels.sumRows(listAsTokens(spec))),
  pack_rows: wgslKernel(packRows, (spec) => rowKernels.gatherWeights(listAsTokens(spec))),
  pack_rows_grad: wgslKernel(packRowsGrad, (spec) => rowKernels.scatterGradients(listAsTokens(spec))),
};
