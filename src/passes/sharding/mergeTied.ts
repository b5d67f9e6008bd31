/** Tied copies: a model declares one for each position that uses a parameter; one for each stage is left. */
import type { ModelGraph } from "../../model/builder.ts";
import { type LeafValue, type Value, withArgs } from "../../ops/op.ts";
import { nodesOf, rewriteModel } from "../graphOrder.ts";

/**
 * Returns a model in which each stage has at most one copy of a parameter: the owner itself on the owner's stage, else the copy with the
 * least position. `stageOf` returns the physical stage of a position.
 */
export function mergeTied(model: ModelGraph, stageOf: (position: number) => number): ModelGraph {
  const copies = [...new Set(nodesOf(model).flatMap(({ args }) => args))]
    .filter((v): v is LeafValue => v.leaf?.tiedTo !== undefined)
    .sort((a, b) => a.leaf.position - b.leaf.position);
  if (copies.length === 0) return model;
  /** Per copy, the parameter that its stage has. */
  const merged = new Map<Value, Value>();
  /** Per owner, the parameter of each stage. */
  const byStage = new Map<Value, Map<number, Value>>();
  for (const copy of copies) {
    const { tiedTo: owner = copy, position } = copy.leaf;
    const known = byStage.get(owner) ?? new Map([[stageOf(owner.leaf?.position ?? position), owner]]);
    const here = known.get(stageOf(position)) ?? copy;
    byStage.set(owner, known.set(stageOf(position), here));
    merged.set(copy, here);
  }
  const inPlaceOf = (v: Value): Value => merged.get(v) ?? v;
  return rewriteModel(model, (node, args) => withArgs(node, args.map(inPlaceOf)));
}
