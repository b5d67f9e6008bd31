/** Rules B: what a job trains on. */
import { heldOutSources } from "../../schemas/heldOut.ts";
import { rule } from "./rule.ts";

/** Rules of data.sources and data.split. */
export const data = [
  rule({
    code: "B239",
    title: "data.sources excludes another key of data",
    why: "data.sources replaces data.path. Sources are data sets of token ids without labels, and their samples are always shuffled.",
    level: "error",
    *check({ data: { path, sources, labels, order } }) {
      if (sources === undefined) return;
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
          safe: { "data.order": undefined },
        };
    },
    bad: "data: {path: corpus, sources: [{path: corpus}], order: shuffled}",
  }),
  rule({
    code: "B245",
    title: "data.split gives training no share",
    why: "The first share of split is that of training, the second that of validation, the third that of test.",
    level: "error",
    *check({ data: { split } }) {
      if (split?.[0] !== 0) return;
      yield {
        at: "data.split",
        found: `split [${split.join(", ")}]`,
        fix: "the first share is that of training: [99, 1, 0]",
        tries: [{ "data.split": [99, 1, 0] }],
      };
    },
    bad: "data: {path: corpus, split: [0, 0, 0]}",
  }),
  rule({
    code: "B246",
    title: "data.split and data sets of their own both hold data out",
    why: "Validation and test data are shares of the training data (data.split), or data sets of their own (data.validation, data.test).",
    level: "error",
    *check({ data: { split, validation, test } }) {
      if ((split?.[1] ?? 0) + (split?.[2] ?? 0) === 0 || (!validation && !test)) return;
      yield {
        at: "data.split",
        related: [validation ? "data.validation" : "data.test"],
        found: `split [${split?.join(", ")}] and data.${validation ? "validation" : "test"}`,
        fix: "leave one of them out",
        tries: [{ "data.split": [1] }],
      };
    },
    bad: "data: {path: corpus, split: [9, 1], validation: [{path: other}]}",
  }),
  rule({
    code: "B247",
    title: "data.split cannot be used with data.labels",
    why: "Labels mark tokens of the whole file of data.path. The loss of an evaluation is the mean over all tokens of its data.",
    level: "error",
    *check({ data: { split, labels } }) {
      if (labels === null || split === undefined) return;
      yield {
        at: "data.split",
        related: ["data.labels"],
        found: "data.split with data.labels",
        fix: "leave one of them out; data.validation names data sets to evaluate on",
        tries: [{ "data.labels": null }],
      };
    },
    bad: "data: {path: corpus, labels: marks, split: [9, 1]}",
  }),
  rule({
    code: "B248",
    title: "train.evaluation has no data",
    why: "An evaluation reads data that is not trained on. During training that is the validation data, at the end the test data as well.",
    level: "error",
    *check({ train: { evaluation }, data }) {
      if (evaluation === null) return;
      const has = { validation: heldOutSources(data, "validation") !== undefined, test: heldOutSources(data, "test") !== undefined };
      if (has.validation || (has.test && evaluation.every === null)) return;
      yield {
        at: "train.evaluation",
        related: ["data.split"],
        found: has.test ? `an evaluation every ${evaluation.every} steps, and test data alone` : "neither data.split nor data.validation",
        fix: has.test ? "give validation a share, or set train.evaluation.every to null" : "hold data out: data.split: [99, 1]",
        tries: has.test ? [{ "train.evaluation.every": null }] : [{ "data.split": [99, 1] }],
      };
    },
    bad: "train: {evaluation: {steps: 1}}",
  }),
  rule({
    code: "B249",
    title: "data.documents cannot keep documents apart",
    why: "A document ends with a token of its own: a prepared data set names it in PREFIX.json, and any other corpus needs it as data.documents.end.",
    level: "error",
    *check({ model, data: { documents, sources } }) {
      if (!documents) return;
      const { end, ...apart } = documents;
      if (end === null && sources === undefined)
        yield {
          ...{ at: "data.documents.end", related: ["data.path"], found: "no end of documents in a corpus without description" },
          fix: "name the id of the token that ends a document, or prepare a data set and name it in data.sources",
        };
      if (end !== null && end >= model.vocab)
        yield {
          ...{ at: "data.documents.end", related: ["model.vocab"], found: `end ${end}, and ids go up to ${model.vocab - 1}` },
          fix: "name the id of the token that ends a document",
        };
      if (!Object.values(apart).includes(true))
        yield {
          ...{ at: "data.documents", found: "mask, positions and loss are all false" },
          fix: "leave data.documents out, or turn one of them on",
          tries: [{ "data.documents.mask": true }],
        };
    },
    bad: "data: {documents: {mask: false, positions: false, loss: false, end: 0}}",
  }),
];
