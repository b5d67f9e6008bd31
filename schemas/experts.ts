/** Which layers of a job have experts, and how their router balances; apart from the schema of jobs, which is slow to load. */

import type { Balance } from "./job/moe.ts";
import type { Job } from "./job.ts";
import { depthsOf } from "./mtp.ts";

/** Returns whether a layer has experts. */
export function hasExperts({ moe }: Pick<Job["model"], "moe">, layer: number): boolean {
  if (moe === null || moe.layers === "all") return moe !== null;
  if (Array.isArray(moe.layers)) return moe.layers[layer] === 1;
  return layer >= moe.layers.first_dense && layer % moe.layers.every === 0;
}

/** Returns the number of layers with experts, including depths of multi-token prediction, which are of the last layer's kind. */
export function expertLayersOf(model: Pick<Job["model"], "moe" | "mtp" | "layers">): number {
  const own = Array.from({ length: model.layers }, (_, layer) => layer).filter((layer) => hasExperts(model, layer)).length;
  return own + (hasExperts(model, model.layers - 1) ? depthsOf(model) : 0);
}

type Moe = NonNullable<Job["model"]["moe"]>;
type Router = Moe["router"];
/** Returns the balancing methods with their weights. Lists of different lengths are cut to the shorter one. */
export function balancesOf({ balance, aux_coeff }: Router): readonly { readonly by: Balance; readonly coeff: number }[] {
  const coeffs = [aux_coeff].flat();
  return [balance].flat().flatMap((by, i) => {
    const coeff = coeffs[i];
    return coeff === undefined ? [] : [{ by, coeff }];
  });
}
/** Returns the balancing method that changes the choice of experts instead of adding a loss; undefined if there is none. */
export const evenBy = ({ balance }: Router): "sinkhorn" | "quantile" | undefined =>
  [balance].flat().find((by): by is "sinkhorn" | "quantile" => by === "sinkhorn" || by === "quantile");

/** On how many of the `ranks` of an expert group a token has experts: at most, and on average if the load is balanced. */
export interface RanksOfToken {
  readonly most: number;
  readonly mean: number;
}
/**
 * Returns on how many of `ranks` a token has experts that chooses `rows` of them: `experts` lie on the ranks in equal, consecutive shares.
 * On average a token that draws k of E experts misses a rank of K experts with the probability C(E − K, k)/C(E, k). A router that limits
 * groups limits the ranks; a fractional `rows`, a mean itself, is interpolated.
 */
export function ranksOfToken({ experts, router }: Pick<Moe, "experts" | "router">, ranks: number, rows: number): RanksOfToken {
  const { groups, group_top_k } = router;
  const own = experts / ranks;
  const size = experts / groups;
  const choosesByGroups = router.type === "top_k" && router.force === "none" && evenBy(router) === undefined;
  const limited = choosesByGroups && rows <= group_top_k * size;
  // a group that is not of whole ranks may share its first and its last one
  const touched = (g: number): number => Math.floor(((g + 1) * size - 1) / own) - Math.floor((g * size) / own) + 1;
  const ofGroup = limited ? Math.max(...Array.from({ length: groups }, (_, g) => touched(g))) : ranks;
  const reached = limited ? Math.min(ranks, group_top_k * ofGroup) : ranks;
  const most = Math.min(reached, Math.ceil(rows));
  // where groups are whole ranks, a token draws from the experts of those that it reaches
  const [open, from] = limited && ranks % groups === 0 ? [reached, reached * own] : [ranks, experts];
  let missed = 1;
  for (let drawn = 0; drawn < rows; drawn++) missed *= Math.max(0, (from - own - drawn) / (from - drawn)) ** Math.min(1, rows - drawn);
  return { most, mean: Math.min(most, open * (1 - missed)) };
}

/** Returns whether a token is sent once to several of its experts: those of a rank, or of a node. */
export const sendsTokensOnce = ({ dispatch }: Pick<Moe, "dispatch">): boolean => dispatch === "once" || dispatch === "once_per_node";

/** Returns how many rows of a token are sent to the `ranks` of an exchange of rows, on average if the load is balanced. */
export function rowsSent(moe: Moe, ranks: number): number {
  if (moe.dispatch === "all_gather") return ranks;
  return moe.dispatch === "all_to_all" ? moe.top_k : ranksOfToken(moe, ranks, moe.top_k).mean;
}

interface Placed {
  readonly parallel: Pick<Job["parallel"], "world" | "tensor" | "context" | "pipeline" | "expert" | "expert_tensor" | "order">;
  readonly cluster: Pick<Job["cluster"], "gpus_per_node">;
}

const divisor = (a: number, b: number): number => (b === 0 ? a : divisor(b, a % b));

/** Returns the largest number by which neighbouring ranks of a stage are divided so that each share is on one node. */
function neighboursOnNode({ parallel: p, cluster: { gpus_per_node: gpus } }: Placed): number {
  // in this order of axes other stages follow the tensor and context ranks, and both grids have runs of this length
  const near = p.order === "tp-cp-ep-pp-dp" && p.pipeline > 1 ? p.tensor * p.context : p.world / p.pipeline;
  return p.world <= gpus ? near : divisor(near, gpus);
}

/** The nodes of an expert group, and how many of its ranks each node has; expert tensor ranks count as one. */
export interface ExpertNodes {
  readonly nodes: number;
  readonly perNode: number;
}
/**
 * Returns the nodes of each expert group. Returns undefined if nodes begin at different places of the groups, or between the ranks that share
 * an expert.
 */
export function nodesOfExperts(placed: Placed): ExpertNodes | undefined {
  const { expert, expert_tensor } = placed.parallel;
  const neighbours = neighboursOnNode(placed);
  const most = neighbours / expert_tensor;
  if (most % expert === 0) return { nodes: 1, perNode: expert };
  const isWhole = neighbours === placed.cluster.gpus_per_node && Number.isInteger(most) && expert % most === 0;
  return isWhole ? { nodes: expert / most, perNode: most } : undefined;
}
/** Returns whether rows that are sent once to each node take two exchanges: there are several nodes, with several ranks of the group each. */
export const hasTwoHops = ({ nodes, perNode }: ExpertNodes): boolean => nodes > 1 && perNode > 1;
/** Returns the nodes of each expert group if tokens are sent once to each node, in two exchanges; otherwise undefined. */
export function nodesOfDispatch({
  model: { moe },
  ...placed
}: Placed & { readonly model: { readonly moe?: Pick<Moe, "dispatch"> | null } }): ExpertNodes | undefined {
  const found = moe?.dispatch === "once_per_node" ? nodesOfExperts(placed) : undefined;
  return found && hasTwoHops(found) ? found : undefined;
}

/** An exchange of rows on their way to experts: ranks so many apart, and how many rows of a token it sends, on average if the load is balanced. */
export interface RowHop {
  readonly ranks: number;
  readonly stride: number;
  readonly rows: number;
}
/** Returns the exchanges of rows on their way to experts: one, or one between nodes and one inside. They come back by the same. */
export function hopsOfRows(job: Placed & { readonly model: { readonly moe: Moe } }): readonly RowHop[] {
  const { expert: ranks, expert_tensor: stride } = job.parallel;
  const { moe } = job.model;
  const found = nodesOfDispatch(job);
  if (!found) return [{ ranks, stride, rows: rowsSent(moe, ranks) }];
  return [
    { ranks: found.nodes, stride: stride * found.perNode, rows: rowsSent(moe, found.nodes) },
    { ranks: found.perNode, stride, rows: rowsSent(moe, ranks) },
  ];
}
