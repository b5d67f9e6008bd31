/** How a group of ranks lies on nodes, as far as the time of a collective depends on it. */
import type { Collective } from "../../../schemas/plan.ts";
import { groupMembers, type MeshData, rankAt } from "../../../schemas/sharding.ts";

/** A group: its ranks, the nodes that they are on, and the fewest of them on one node: so many adapters serve the group there. */
export interface GroupTopology {
  readonly ranks: number;
  readonly nodes: number;
  readonly perNode: number;
}

/** Returns a function that finds the topology of the groups of a stage's collectives; it looks at each set of sub-axes once. */
export function topologyOf(mesh: MeshData, stage: number): (collective: Pick<Collective, "subAxes" | "world">) => GroupTopology {
  const known = new Map<string, GroupTopology>();
  return ({ subAxes, world = false }) => {
    const key = world ? "world" : subAxes.join();
    const found = known.get(key) ?? (world ? wholeWorld(mesh) : worstGroup(mesh, stage, subAxes));
    known.set(key, found);
    return found;
  };
}

const wholeWorld = (mesh: MeshData): GroupTopology => ({
  ranks: mesh.world,
  nodes: Math.ceil(mesh.world / mesh.gpus_per_node),
  perNode: Math.min(mesh.world, mesh.gpus_per_node),
});

/** Returns the group of a stage that is on most nodes: all groups of a collective run at once, and the slowest decides. */
function worstGroup(mesh: MeshData, stage: number, subAxes: readonly number[]): GroupTopology {
  const seen = new Set<number>();
  let worst: GroupTopology = { ranks: 1, nodes: 1, perNode: 1 };
  for (let n = 0; n < mesh.per_stage; n++) {
    if (seen.has(n)) continue;
    const members = groupMembers(mesh, n, subAxes);
    const perNode = new Map<number, number>();
    for (const member of members) {
      seen.add(member);
      const node = Math.floor(rankAt(mesh, stage, member) / mesh.gpus_per_node);
      perNode.set(node, (perNode.get(node) ?? 0) + 1);
    }
    const group = { ranks: members.length, nodes: perNode.size, perNode: Math.min(...perNode.values()) };
    if (worst.ranks === 1 || group.nodes > worst.nodes || (group.nodes === worst.nodes && group.perNode < worst.perNode)) worst = group;
  }
  return worst;
}
