/** What the search finds: panels, ranks, axes, instructions, tensors, kernels, keys of the job. */
import { anyLayer } from "../analysis/layerText.ts";
import { axisTitles } from "./panels/mesh.tsx";
import { axisNames, type PlanModel } from "./planModel.ts";
import { type PanelName, panelNames, type Selection } from "./state.ts";

/** Something that the search finds. */
export interface Hit {
  readonly kind: string;
  readonly text: string;
  readonly note: string;
  readonly panel: PanelName;
  readonly selection?: Selection;
}

const indexes = new WeakMap<PlanModel, Hit[]>();

/** Returns all that can be found in a plan but ranks; equal layers are one entry. */
function indexOf(model: PlanModel): Hit[] {
  const known = indexes.get(model) ?? readIndex(model);
  indexes.set(model, known);
  return known;
}

function readIndex(model: PlanModel): Hit[] {
  const hits: Hit[] = panelNames.map((panel) => ({ kind: "panel", text: panel, note: "", panel }));
  for (const axis of axisNames)
    if (model.view.mesh.sizes[axis] > 1)
      hits.push({ kind: "axis", text: axis, note: axisTitles[axis], panel: "mesh", selection: { kind: "axis", axis } });
  const seen = new Set<string>();
  for (const [stage, { blocks, state }] of model.view.stages.entries()) {
    for (const block of blocks)
      for (const { id, layer, view } of model.instructions(stage, block)) {
        const form = anyLayer(id, layer);
        const key = `${block.kind} ${form}`;
        if (seen.has(key)) continue;
        seen.add(key);
        const selection = { kind: "instruction", stage, phase: block.kind, chunk: block.chunk, id } as const;
        const kind = view.kind === "compute" ? "instruction" : view.kind === "collective" ? "collective" : "transfer";
        hits.push({
          kind,
          text: form,
          note: `${view.does}, ${block.kind}${view.stream ? `, stream ${view.stream}` : ""}`,
          panel: "program",
          selection,
        });
      }
    for (const { id, kind } of state) {
      if (seen.has(id)) continue;
      seen.add(id);
      hits.push({ kind: "tensor", text: id, note: kind, panel: "memory", selection: { kind: "tensor", stage, id } });
    }
  }
  for (const { id, op } of model.view.kernels)
    hits.push({ kind: "kernel", text: id, note: op, panel: "kernels", selection: { kind: "kernel", id } });
  for (const path of Object.keys(model.view.job.places))
    hits.push({ kind: "job key", text: path, note: "", panel: "findings", selection: { kind: "key", path } });
  return hits;
}

/** The most hits. */
const MOST = 40;

/** Returns the hits that contain all words, those that begin with the text first, then short ones. A number is a rank. */
export function searchPlan(model: PlanModel, text: string): Hit[] {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const number = /^(?:rank\s*)?(\d+)$/.exec(text.trim().toLowerCase());
  const rank = number ? Number(number[1]) : -1;
  const ranks: Hit[] =
    rank >= 0 && rank < model.view.mesh.world
      ? [{ kind: "rank", text: `rank ${rank}`, note: `stage ${model.stageOf(rank)}`, panel: "mesh", selection: { kind: "rank", rank } }]
      : [];
  if (words.length === 0) return indexOf(model).slice(0, panelNames.length);
  const [first = ""] = words;
  const score = ({ text: name, kind }: Hit): number =>
    (name.toLowerCase().startsWith(first) ? 0 : 1000) + (kind === "collective" ? 0 : 50) + name.length;
  const found = indexOf(model).filter(({ kind, text: name, note }) => {
    const all = `${kind} ${name} ${note}`.toLowerCase();
    return words.every((word) => all.includes(word));
  });
  return [...ranks, ...found.sort((a, b) => score(a) - score(b))].slice(0, MOST);
}
