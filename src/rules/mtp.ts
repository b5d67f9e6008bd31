/** Rules M, P: multi-token prediction. */
import { readLayout } from "../passes/pipelineStages.ts";
import { divisorsNear, type Rule, rule } from "./rule.ts";

/** Rules of multi-token prediction. */
export const mtp: readonly Rule[] = [
  rule({
    code: "M340",
    title: "mtp.layers is not below the sequence length",
    why: "Depth k predicts from tokens that have k more tokens after them. In a sequence of at most k tokens there are none.",
    level: "error",
    *check({ model: m }) {
      if (!m.mtp || m.mtp.layers < m.seq) return;
      yield {
        at: "model.mtp.layers",
        related: ["model.seq"],
        found: `${m.mtp.layers} depths in sequences of ${m.seq}`,
        fix: "1 or 2 are usual",
        tries: [{ "model.mtp.layers": 1 }, { "model.mtp": null }],
      };
    },
    bad: "model: {mtp: {layers: 48}}",
  }),
  rule({
    code: "M341",
    title: "mtp.coeff is not above 0",
    why: "With 0 the additional layers are computed and get no gradient; a negative value increases their loss.",
    level: "error",
    *check({ model: m }) {
      if (!m.mtp || m.mtp.coeff > 0) return;
      yield {
        at: "model.mtp.coeff",
        found: `coeff ${m.mtp.coeff}`,
        fix: "0.1 is usual; model.mtp: null trains without",
        tries: [{ "model.mtp.coeff": 0.1 }],
      };
    },
    bad: "model: {mtp: {layers: 1, coeff: 0}}",
  }),
  rule({
    code: "M342",
    title: "tensor does not divide hidden, as multi-token prediction needs",
    why: "The projection of a token's two vectors to one is sharded along its width over the tensor ranks, in equal parts.",
    level: "error",
    *check({ model: m, parallel: { tensor } }) {
      if (!m.mtp || m.hidden % tensor === 0) return;
      yield {
        at: "model.hidden",
        related: ["parallel.tensor"],
        found: `hidden ${m.hidden} over ${tensor} tensor ranks leaves ${m.hidden % tensor} over`,
        fix: `tensor must divide ${m.hidden}`,
        tries: divisorsNear(m.hidden, tensor).map((t) => ({ "parallel.tensor": t })),
      };
    },
    bad: "model: {hidden: 14, head_dim: 4, heads: 4, mtp: {layers: 1}}\nparallel: {world: 4, tensor: 4}",
  }),
  rule({
    code: "M343",
    title: "multi-token prediction excludes learned positions",
    why: "A depth reads the embedding of a later token, and no position is defined for it there; Megatron-LM refuses both together.",
    level: "error",
    *check({ model: m }) {
      if (!m.mtp || m.positions !== "learned") return;
      yield {
        at: "model.positions",
        related: ["model.mtp"],
        found: "positions: learned with mtp",
        fix: "rope or none",
        tries: [{ "model.positions": "rope" }, { "model.mtp": null }],
      };
    },
    bad: "model: {positions: learned, mtp: {layers: 1}}",
  }),
  rule({
    code: "P118",
    title: "layout splits multi-token prediction, or places it too early",
    why: "The layers of multi-token prediction run after all others and share one copy of the embedding. They must be together, in the last chunk of a stage that is not the first. Megatron-LM has the same restriction.",
    level: "error",
    *check({ parallel: p }) {
      const parts = p.layout === null ? "" : readLayout(p.layout);
      if (typeof parts === "string" || p.pipeline === 1 || parts.length % p.pipeline !== 0) return;
      const places = parts.flatMap((letters, v) => (letters.includes("m") ? [v] : []));
      const chunk = (v: number) => Math.floor(v / p.pipeline);
      const last = chunk(parts.length - 1);
      const wrong =
        places.length > 1
          ? `m stands in ${places.length} parts`
          : places.some((v) => v % p.pipeline === 0)
            ? "m stands on the first stage"
            : places.some((v) => chunk(v) < last)
              ? `m stands in chunk ${chunk(places[0] ?? 0)} of 0..${last}`
              : undefined;
      if (wrong === undefined) return;
      yield {
        at: "parallel.layout",
        related: ["model.mtp"],
        found: `${wrong}: ${p.layout}`,
        fix: "write all m in the stage of L, or in the stage before it",
        tries: [{ "parallel.layout": null }],
      };
    },
    bad: "model: {mtp: {layers: 2}}\nparallel: {world: 2, pipeline: 2, layout: Ettttmm|L}\ntrain: {global_batch: 8}",
  }),
];
