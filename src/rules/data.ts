/** Rules B: what a job trains on. */
import { rule } from "./rule.ts";

/** Rules of data.sources and data.split. */
export const data = [
  rule({
    code: "B239",
    title: "data.sources goes with another key of data",
    why: "Sources are data sets of token ids: they take the place of path, their documents have no labels beside them, and only they are split.",
    level: "error",
    *check({ data: { path, sources, split, labels, order } }) {
      if (sources === undefined) {
        if (split !== undefined)
          yield { at: "data.split", found: "a split without data.sources", fix: "name the data set in data.sources: [{path: PREFIX}]" };
        return;
      }
      if (path !== sources[0]?.path)
        yield { at: "data.path", related: ["data.sources"], found: "both data.path and data.sources", fix: "leave one of them out" };
      if (labels !== null)
        yield {
          ...{ at: "data.labels", related: ["data.sources"], found: "data.labels with data.sources", fix: "leave one of them out" },
          tries: [{ "data.labels": null }],
        };
      if (order === "shuffled")
        yield {
          ...{
            at: "data.order",
            related: ["data.sources"],
            found: "order shuffled with data.sources",
            fix: "leave it out: samples of sources are always shuffled",
          },
          tries: [{ "data.order": "sequential" }],
        };
      if (split?.[0] === 0)
        yield {
          at: "data.split",
          found: "no share for training",
          fix: "the first share is that of training: [99, 1, 0]",
          tries: [{ "data.split": [99, 1, 0] }],
        };
    },
    bad: "data: {path: corpus, sources: [{path: corpus}], split: [0, 1]}",
  }),
];
