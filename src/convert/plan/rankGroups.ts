/** Communicators of a plan: the groups of ranks that run collectives, numbered in the order in which they are asked for. */
import type { Collective } from "../../../schemas/plan.ts";
import { groupMembers, type MeshData, numberInStage, rankAt, stageOfRank } from "../../../schemas/sharding.ts";

/** A communicator: its name, a number as text, and its ranks, ascending. */
export interface RankGroup {
  readonly name: string;
  readonly axes: string;
  readonly ranks: readonly number[];
}

/** Finds the communicator of a collective on a rank. Equal groups have one communicator. */
export class RankGroups {
  readonly #mesh: MeshData;
  readonly #byRanks = new Map<string, RankGroup>();
  readonly #byUse = new Map<string, RankGroup>();

  constructor(mesh: MeshData) {
    this.#mesh = mesh;
  }
  get all(): readonly RankGroup[] {
    return [...this.#byRanks.values()];
  }
  of(rank: number, { subAxes, world, axes }: Pick<Collective, "subAxes" | "world" | "axes">): RankGroup {
    const use = `${rank} ${world ? "world" : subAxes.join()}`;
    const known = this.#byUse.get(use);
    if (known) return known;
    const mesh = this.#mesh;
    const stage = stageOfRank(mesh, rank);
    const ranks = world
      ? Array.from({ length: mesh.world }, (_, r) => r)
      : groupMembers(mesh, numberInStage(mesh, rank), subAxes).map((n) => rankAt(mesh, stage, n));
    const key = ranks.join();
    const found = this.#byRanks.get(key) ?? { name: `${this.#byRanks.size + 1}`, axes, ranks };
    this.#byRanks.set(key, found);
    this.#byUse.set(use, found);
    return found;
  }
}
