/** Rules B: recomputation in the backward pass. */
import { hasExperts } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { type Rule, rule } from "./rule.ts";

type Recompute = Job["train"]["recompute"];
type Module = Recompute["modules"][number];

/** The part of the model that a module needs, and the key that enables it. */
const needs: Readonly<
  Partial<
    Record<Module, { readonly key: "model.mla" | "model.moe" | "model.moe.shared" | "model.moe.layers"; has(m: Job["model"]): boolean }>
  >
> = {
  mla_up_proj: { key: "model.mla", has: (m) => m.mla !== null },
  moe: { key: "model.moe", has: (m) => m.moe !== null },
  moe_act: { key: "model.moe", has: (m) => m.moe !== null },
  moe_permute: { key: "model.moe", has: (m) => m.moe !== null },
  shared_experts: { key: "model.moe.shared", has: (m) => m.moe !== null && m.moe.shared !== null },
  mlp: { key: "model.moe.layers", has: (m) => Array.from({ length: m.layers }, (_, i) => hasExperts(m, i)).includes(false) },
};

/** The keys of each mode. */
const readBy: Readonly<Record<Recompute["mode"], readonly (keyof Recompute)[]>> = {
  none: [],
  selective: ["modules"],
  full: ["method", "layers"],
};
const unwritten: Omit<Recompute, "mode"> = { modules: ["core_attn"], method: "uniform", layers: 1 };

/** Rules of recomputation. */
export const recompute: readonly Rule[] = [
  rule({
    code: "B230",
    title: "a recomputed module is not in the model",
    why: "The model has no such part, so that recomputation saves no memory. Megatron-LM ignores most of these modules and refuses mla_up_proj without latent attention.",
    level: "warning",
    *check({ model, train: { recompute: r } }) {
      if (r.mode !== "selective") return;
      const missing = r.modules.flatMap((name) => {
        const need = needs[name];
        return need?.has(model) === false ? [{ name, key: need.key }] : [];
      });
      const [first] = missing;
      if (!first) return;
      const others = r.modules.filter((module) => !missing.some(({ name }) => name === module));
      yield {
        at: "train.recompute.modules",
        related: [first.key],
        found: missing.map(({ name, key }) => `${name}, where ${name === "mlp" ? "every layer has experts" : `${key} is null`}`).join("; "),
        fix: "core_attn usually saves most memory",
        ...(others.length > 0
          ? { safe: { "train.recompute.modules": others } }
          : { tries: [{ "train.recompute.modules": ["core_attn"] }] }),
      };
    },
    bad: "train: {recompute: {mode: selective, modules: [mla_up_proj]}}",
  }),
  rule({
    code: "B231",
    title: "the recompute mode ignores a key",
    why: "selective recomputes the named modules, full recomputes layers; each ignores the keys of the other.",
    level: "warning",
    *check({ train: { recompute: r } }) {
      const idle = (Object.keys(unwritten) as (keyof typeof unwritten)[]).filter(
        (key) => !readBy[r.mode].includes(key) && String(r[key]) !== String(unwritten[key]),
      );
      if (idle.length === 0) return;
      const mode = idle.includes("modules") ? "selective" : "full";
      yield {
        at: "train.recompute.mode",
        related: idle.map((key) => `train.recompute.${key}` as const),
        found: `mode ${r.mode} does not read ${idle.join(" and ")}`,
        fix: `mode ${mode} reads it`,
        tries: [{ "train.recompute.mode": mode }, Object.fromEntries(idle.map((key) => [`train.recompute.${key}`, unwritten[key]]))],
      };
    },
    bad: "train: {recompute: {modules: [layernorm]}}",
  }),
  rule({
    code: "B232",
    title: "more layers are recomputed than a chunk has",
    why: "A chunk cannot recompute more layers than it has, and a group of layers cannot be larger than the chunk.",
    level: "warning",
    *check({ model, parallel, train: { recompute: r } }) {
      if (r.mode !== "full" || parallel.layout !== null) return;
      const chunk = model.layers / (parallel.pipeline * parallel.virtual_pipeline);
      if (r.layers <= chunk) return;
      yield {
        at: "train.recompute.layers",
        related: ["model.layers", "parallel.pipeline"],
        found: `${r.layers} layers, and a ${parallel.virtual_pipeline > 1 ? "chunk" : "stage"} has ${chunk}`,
        fix: `${chunk} has the same effect`,
        safe: { "train.recompute.layers": chunk },
      };
    },
    bad: "train: {recompute: {mode: full, layers: 100}}",
  }),
];
