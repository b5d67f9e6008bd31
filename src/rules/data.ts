/** Rules B: what a job trains on. */
import { rule } from "./rule.ts";

/** Rules of data.sources and data.split. */
export const data = [
  rule({
    code: "B239",
    title: "data.sources excludes another key of data",
    why: "data.sources replaces data.path. Sources are data sets of token ids without labels, and only sources can be split.",
    level: "error",
    *check({ data: { path, sources, split, labels, order } }) {
      if (sources === undefined) {
        if (split !== undefined)
          yield { at: "data.split", found: "data.split without data.sources", fix: "name the data set in data.sources: [{path: PREFIX}]" };
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
            fix: "leave order out: samples of sources are always shuffled",
          },
          tries: [{ "data.order": "sequential" }],
        };
      if (split?.[0] === 0)
        yield {
          at: "data.split",
          found: "the share of training is 0",
          fix: "the first share is training: [99, 1, 0]",
          tries: [{ "data.split": [99, 1, 0] }],
        };
    },
    bad: "data: {path: corpus, sources: [{path: corpus}], split: [0, 1]}",
  }),
];
