/** Where collectives and transfers run: how many ranks and nodes a group has, and which share of the bytes crosses nodes. */
import type { Collective } from "../../schemas/plan.ts";
import { groupMembers, type MeshData, rankAt, shardCount } from "../../schemas/sharding.ts";

/** The links of the groups of a collective. */
export interface Link {
  /** Ranks of a group. */
  readonly ranks: number;
  /** The largest number of nodes that a group is on. */
  readonly nodes: number;
  /** The share of a rank's bytes that goes to another node: the mean over the ranks of the stage. */
  readonly across: number;
}

type Grouped = Pick<Collective, "subAxes" | "world" | "how">;

/** Returns a function that finds the links of the collectives of a stage; it counts each set of sub-axes once. */
export function linksOf(mesh: MeshData, stage: number): (collective: Grouped) => Link {
  const known = new Map<string, Link>();
  return ({ subAxes, world = false, how }) => {
    const isExchange = how === "all_to_all";
    const key = `${world}|${isExchange}|${subAxes.join()}`;
    const found = known.get(key) ?? (world ? worldLink(mesh) : groupLink(mesh, stage, subAxes, isExchange));
    known.set(key, found);
    return found;
  };
}

const nodeOf = (mesh: MeshData, rank: number): number => Math.floor(rank / mesh.gpus_per_node);

/** All ranks form a ring that visits each node once. */
function worldLink(mesh: MeshData): Link {
  const nodes = Math.ceil(mesh.world / mesh.gpus_per_node);
  return { ranks: mesh.world, nodes, across: nodes > 1 ? nodes / mesh.world : 0 };
}

/** In an exchange each rank sends to all others; otherwise a ring visits one node after the other, and one link of each node leaves it. */
function groupLink(mesh: MeshData, stage: number, subAxes: readonly number[], isExchange: boolean): Link {
  const ranks = shardCount(mesh, subAxes);
  const seen = new Set<number>();
  let [most, crossing] = [1, 0];
  for (let n = 0; n < mesh.per_stage; n++) {
    if (seen.has(n)) continue;
    const perNode = new Map<number, number>();
    for (const member of groupMembers(mesh, n, subAxes)) {
      seen.add(member);
      const node = nodeOf(mesh, rankAt(mesh, stage, member));
      perNode.set(node, (perNode.get(node) ?? 0) + 1);
    }
    most = Math.max(most, perNode.size);
    if (perNode.size === 1) continue;
    // ranks whose peer is elsewhere; in an exchange the share of peers elsewhere, summed over ranks
    for (const here of perNode.values()) crossing += isExchange ? (here * (ranks - here)) / (ranks - 1) : 1;
  }
  return { ranks, nodes: most, across: crossing / mesh.per_stage };
}

/** Returns the share of the ranks of a stage whose rank with the same number on another stage is on another node. */
export function transferAcross(mesh: MeshData, stage: number, peer: number): number {
  let crossing = 0;
  for (let n = 0; n < mesh.per_stage; n++) if (nodeOf(mesh, rankAt(mesh, stage, n)) !== nodeOf(mesh, rankAt(mesh, peer, n))) crossing++;
  return crossing / mesh.per_stage;
}

/** Returns the links of a group in words: `inside a node`, `across 2 nodes`. */
export const linkText = ({ ranks, nodes }: Pick<Link, "ranks" | "nodes">): string =>
  ranks === 1 ? "" : nodes === 1 ? "inside a node" : `across ${nodes} nodes`;
