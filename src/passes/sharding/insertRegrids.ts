/** Tokens that change from the dense grid to the expert grid and back, where the grids do not nest. */
import type { ModelGraph } from "../../model/builder.ts";
import { changed, declared, invariant, type Node, type Regrid, type Value, withArgs } from "../../ops/op.ts";
import { regridded } from "../../ops/regrid.ts";
import { rewriteModel } from "../graphOrder.ts";
import { hasSeparateGrids, type Mesh } from "../mesh.ts";

/** The axes of the tokens [B,S,…] in each grid. All ranks of a stage shard them. */
const denseTokens: Regrid["from"] = [["dp"], ["cp", "tp"], []];
const expertTokens: Regrid["to"] = [["edp", "ep", "etp"], [], []];

/** Returns whether a node works in the expert grid: it reads or makes rows of experts. */
const isExpertNode = ({ args, outs }: Pick<Node, "args" | "outs">): boolean => [...args, ...outs].some((v) => v.ragged > 0);

/**
 * Returns a model with a regrid where tokens enter and leave the nodes of experts, if the grids of a mesh do not nest (P104); else the
 * model itself. In the expert grid, sequences are numbered by rank and a sequence has the tokens of one rank.
 */
export function insertRegrids(model: ModelGraph, mesh: Mesh): ModelGraph {
  if (!hasSeparateGrids(mesh)) return model;
  const { tp, cp, dp } = mesh.sizes;
  const entered = new Map<Value, Value>();
  const enter = (v: Value, id: string): Value => {
    const [B, S] = tokensOf(v);
    const known = entered.get(v) ?? regridded(v, [(B / dp) * mesh.per_stage, S / (cp * tp)], { from: denseTokens, to: expertTokens }, id);
    entered.set(v, known);
    return known;
  };
  /** Per dense result of an expert node, the same tokens in the dense grid. */
  const left = new Map<Value, Value>();
  const leave = (v: Value, axes: Value["shardAxes"]): Value => {
    const [T, L] = tokensOf(v);
    const sizes = [(T / mesh.per_stage) * dp, L * cp * tp] as const;
    const y = regridded(v, sizes, { from: expertTokens, to: denseTokens }, `${v.node?.id}.${v.node?.op.outputs[v.out]?.name}`);
    return axes ? declared(y, { shardAxes: axes }) : y;
  };
  return rewriteModel(model, (node, args) => {
    if (!isExpertNode(node))
      return withArgs(
        node,
        args.map((v) => left.get(v) ?? v),
      );
    const operands = args.map((v, i) => {
      const isTokens = v.ragged === 0 && v.leaf?.kind !== "parameter";
      return isTokens ? enter(left.get(v) ?? v, `${node.id}.${node.op.inputs[i]?.name}`) : v;
    });
    const made = inExpertGrid(withArgs(node, operands));
    // the declared axes of a dense result are those of the dense grid: the regrid takes them over
    const inGrid = changed(made, { outs: made.outs.map(({ shardAxes: _, ...out }) => out) });
    for (const out of inGrid.outs) if (out.ragged === 0) left.set(out, leave(out, made.outs[out.out]?.shardAxes));
    return inGrid;
  });
}

/** Returns a node whose pins of tokens, if it has any, are those of the expert grid. */
function inExpertGrid(node: Node): Node {
  const pins = node.pins?.flatMap((pin) => {
    if (!denseTokens.flat().includes(pin.axis)) return [pin];
    return pin.axis === "dp" ? expertTokens.flat().map((axis) => ({ ...pin, dim: "B", axis })) : [];
  });
  return pins ? changed(node, { pins }) : node;
}

/** Returns the first two sizes of tokens. */
function tokensOf({ sizes: [B, S] }: Value): readonly [number, number] {
  invariant(B !== undefined && S !== undefined, "tokens have two dims");
  return [B, S];
}
