/** Kernels of embedding and loss without a formula: the terms of the softmax, and the gradient of the embedding. */
import { render } from "../../../templates/bindings.ts";
import { layoutOf, operandIn } from "../../ops/formula.ts";
import { sumOfIds } from "../../ops/paddedVocab.ts";
import { embedGrad, softmaxTerms, sourceLosses } from "../../ops/vocab.ts";
import { formulaText } from "../formulaText.ts";
import { type GeneratedKernel, operandOf, type SpecOf, wgslKernel } from "../kernelSpec.ts";
import { scratchStart } from "../launchArgs.ts";
import { rowKernel } from "./formula.ts";
import { columnSum, THREADS } from "./reduce.ts";
import { bindingOf, type EntryPoint, foldGrid, kernel, scratchBytes, vector, wgsl, widthOf } from "./text.ts";

/** One workgroup makes a list of the tokens of each id in linear time; then the rows of each id are summed in order. */
function sumRowsOfIds(spec: SpecOf<typeof embedGrad>): GeneratedKernel {
  const { V: ids, D } = spec.d;
  const tokens = spec.size.ids;
  const wide = widthOf(D);
  const vectors = D / wide;
  const clears = !spec.accumulates.has("dtable");
  const cleared = ids * vectors;
  const [groups, clearGroups] = [Math.ceil((tokens * vectors) / THREADS), Math.ceil(cleared / THREADS)];
  const type = vector("f32", wide);
  const links = { arg: scratchStart, type: "i32" };
  const entries: EntryPoint[] = [
    {
      ...{ entry: `${spec.name}_link`, grid: [1, 1, 1], threads: THREADS, starts: ["V"] },
      buffers: [
        { arg: "ids", type: "i32" },
        { ...links, name: "links" },
      ],
    },
    {
      ...{ entry: spec.name, grid: groups, threads: THREADS, starts: ["V"], uniform: "start_at" },
      buffers: [
        { arg: "ids", name: "token_ids", type: "i32" },
        bindingOf(operandOf(spec, "dy"), wide),
        { arg: "dtable", type },
        { ...links, name: "linked" },
      ],
    },
  ];
  const clear: EntryPoint = {
    ...{ entry: `${spec.name}_clear`, grid: clearGroups, threads: THREADS },
    buffers: [{ arg: "dtable", name: "cleared", type }],
  };
  const text = render("wgsl/embed_grad.wgsl", {
    ...{ entry: spec.name, threads: THREADS, clears, clearIndex: foldGrid(clearGroups).index, cleared, type },
    ...{ ids, tokens, firstAt: ids + tokens, width: wide, vectors, index: foldGrid(groups).index },
  });
  return kernel(spec, clears ? [clear, ...entries] : entries, [text], scratchBytes(ids + 2 * tokens));
}

/** WGSL kernels of embedding and loss. */
export const vocab = {
  softmax_terms: wgslKernel(softmaxTerms, (spec) => {
    const { V } = spec.d;
    const layout = layoutOf(softmaxTerms);
    const s = sumOfIds(operandIn(layout, "x"), operandIn(layout, "m"), spec.d);
    const width = widthOf(V);
    const logit = width > 1 ? `x_buf[first + u32(v) / ${width}u][u32(v) % ${width}u]` : "x_buf[first + u32(v)]";
    return rowKernel(spec, layout, formulaText(wgsl, { s }), {
      buffers: [
        { arg: "target", name: "wanted", type: "i32" },
        { arg: "p", type: "f32" },
      ],
      starts: ["V"],
      // another shard may hold the target
      statements: [
        "let v = wanted[row] - start.x;",
        "var logit = 0.0;",
        `if (v >= 0 && v < ${V}) {`,
        `  logit = f32(${logit});`,
        "}",
        "p[row] = logit;",
      ],
    });
  }),
  embed_grad: wgslKernel(embedGrad, sumRowsOfIds),
  source_losses: wgslKernel(sourceLosses, (spec) => {
    const sums = columnSum(spec, {
      ...{ out: "y", batches: 1, rows: spec.size.l, width: spec.size.y, first: 0 },
      buffers: [
        { arg: "l", type: "f32" },
        { arg: "weight", type: "f32" },
        { arg: "source", type: "i32" },
      ],
      term: "select(0.0, l[row] * weight[row], u32(source[row]) == column)",
    });
    return kernel(spec, sums.entries, [sums.text], scratchBytes(sums.words));
  }),
};
