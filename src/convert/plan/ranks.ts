/** The ranks of a plan that an export describes. Ranks of one stage run one program, so one of them stands for all. */
import type { MeshData } from "../../../schemas/sharding.ts";
import { rankAt } from "../../../schemas/sharding.ts";
import { Trouble } from "../../../schemas/trouble.ts";

/** A choice of ranks: a stage, or a list such as `0-7,64` or `all`; neither means one rank of each stage. */
export interface RankChoice {
  readonly stage?: number | undefined;
  readonly ranks?: string | undefined;
}

/** Returns the chosen ranks, ascending. Throws a Trouble if the plan lacks one, or if the list cannot be read. */
export function chosenRanks(mesh: MeshData, { stage, ranks }: RankChoice): number[] {
  const stages = mesh.world / mesh.per_stage;
  if (stage !== undefined && ranks !== undefined) throw new Trouble("--stage and --ranks both choose ranks", "give one of them");
  if (stage !== undefined && stage >= stages)
    throw new Trouble(`--stage ${stage}: the plan has ${stages} stages`, `name a stage from 0 to ${stages - 1}`);
  if (stage !== undefined) return [rankAt(mesh, stage, 0)];
  if (ranks === undefined) return Array.from({ length: stages }, (_, s) => rankAt(mesh, s, 0)).sort((a, b) => a - b);
  if (ranks === "all") return Array.from({ length: mesh.world }, (_, rank) => rank);
  const chosen = new Set<number>();
  for (const part of ranks.split(",")) {
    const [, first, last = first] = /^(\d{1,9})(?:-(\d{1,9}))?$/.exec(part.trim()) ?? [];
    if (first === undefined || last === undefined || Number(last) < Number(first))
      throw new Trouble(`--ranks ${ranks} is not a list of ranks`, "write ranks and ranges, such as 0-7,64, or all");
    if (Number(last) >= mesh.world)
      throw new Trouble(`--ranks ${ranks}: the plan has ${mesh.world} ranks`, `name ranks from 0 to ${mesh.world - 1}`);
    for (let rank = Number(first); rank <= Number(last); rank++) chosen.add(rank);
  }
  return [...chosen].sort((a, b) => a - b);
}
