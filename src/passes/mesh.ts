/**
 * Mesh: two grids over the same ranks (dense: tp, cp, dp; expert: etp, ep, edp; both: pp) and the factors both are
 * products of. An axis is a name for a set of factors, so dense and expert axes meet on one value with no conversion step. Where
 * the strides of the grids do not nest they share no factor: tokens go from one to the other by a fold (ops/fold.ts).
 * The first-named axis has stride 1, as in Megatron Core. Factors are digits of a rank's number within its stage, so they do
 * not depend on where stages stand in the order of axes.
 */
import type { Job } from "../../schemas/job.ts";
import { groupMembers, type MeshData, rankAt } from "../../schemas/sharding.ts";
import { invariant, type Value } from "../ops/op.ts";

export type Mesh = MeshData;
export const denseAxes = ["tp", "cp", "dp"] as const;
export const expertAxes = ["etp", "ep", "edp"] as const;

type Meshed = Pick<Job, "parallel" | "cluster"> & { readonly model: Pick<Job["model"], "kv_heads"> };

/** Tensor ranks side by side that each have a copy of one key/value head; 1 where there are heads enough for all. */
export const copiesOfHead = ({ model: { kv_heads }, parallel: { tensor } }: Pick<Meshed, "model" | "parallel">): number =>
  tensor % kv_heads === 0 ? tensor / kv_heads : 1;

export function buildMesh({ model, parallel: p, cluster }: Meshed): Mesh {
  const perStage = p.tensor * p.context * p.data;
  const copies = copiesOfHead({ model, parallel: p });
  const sizes: Record<string, number> = {
    tp: p.tensor,
    cp: p.context,
    dp: p.data,
    etp: p.expert_tensor,
    ep: p.expert,
    edp: perStage / (p.expert_tensor * p.expert),
    pp: p.pipeline,
    kv: p.tensor / copies,
    copies,
  };
  const spansOf = (grid: readonly string[]) => {
    let stride = 1;
    return grid.map((name) => ({ name, from: stride, to: (stride *= sizes[name]!) }));
  };
  const grids = [spansOf(denseAxes), spansOf(expertAxes)];
  const ascending = (bounds: readonly number[]) => [...new Set(bounds)].sort((a, b) => a - b);
  const between = (bounds: readonly number[]) => bounds.slice(1).map((to, i) => ({ stride: bounds[i]!, size: to / bounds[i]! }));
  const whole = (fs: readonly { size: number }[]) => fs.every((f) => Number.isInteger(f.size));
  const instances = perStage / p.optimizer_instances;
  const own = grids.map((spans, g) => ascending([...spans.flatMap((s) => [s.from, s.to]), instances, ...(g === 0 ? [copies] : [])]));
  const shared = between(ascending(own.flat()));
  // where the strides of one grid do not divide the other's, each grid has factors of its own
  const subAxes = whole(shared) ? shared : own.flatMap(between);
  invariant(whole(subAxes), `the axes are no product: strides ${own.join(" and ")}`);
  const first = whole(shared) ? [0, 0] : [0, own[0]!.length - 1];
  const last = whole(shared) ? [subAxes.length, subAxes.length] : [first[1]!, subAxes.length];
  const axes = Object.fromEntries(
    grids.flatMap((spans, g) =>
      spans.map((s) => [
        s.name,
        subAxes.flatMap((f, i) => (i >= first[g]! && i < last[g]! && f.stride >= s.from && f.stride * f.size <= s.to ? [i] : [])),
      ]),
    ),
  );
  axes.kv = axes.tp!.filter((f) => subAxes[f]!.stride >= copies);
  axes.copies = axes.tp!.filter((f) => subAxes[f]!.stride < copies);
  return {
    world: perStage * p.pipeline,
    per_stage: perStage,
    stage_stride: p.order === "tp-cp-ep-pp-dp" ? p.tensor * p.context : perStage,
    ...{ subAxes, axes, sizes, gpus_per_node: cluster.gpus_per_node },
  };
}

/** Whether the grids have no factor in common, since the strides of one do not divide those of the other: then each is all factors of its own. */
export const hasSeparateGrids = ({ subAxes, per_stage }: Pick<Mesh, "subAxes" | "per_stage">): boolean =>
  subAxes.reduce((n, f) => n * f.size, 1) !== per_stage;

/** A set of factors as people name it: `tp`, `dp*cp`, `ep`. Expert names where the value belongs to experts. */
export function axesName(mesh: Mesh, fs: readonly number[], expert: boolean): string {
  const cover = (grid: readonly string[]) => {
    const names = grid.filter((n) => mesh.axes[n]!.length > 0 && mesh.axes[n]!.every((f) => fs.includes(f)));
    return names.flatMap((n) => mesh.axes[n]!).length === fs.length ? names.join("*") : undefined;
  };
  const grids = expert ? [expertAxes, denseAxes] : [denseAxes, expertAxes];
  return cover(grids[0]!) ?? cover(grids[1]!) ?? fs.map((f) => partName(mesh, f, expert)).join("*");
}

/** Rows and the weights of experts are spoken of in expert axes. */
export const isExpert = (v: Value): boolean =>
  v.ragged > 0 || (v.shardAxes?.flat().some((a) => (expertAxes as readonly string[]).includes(a)) ?? false);

/** A factor that is only a part of an axis: `dp/2` says the digit of dp whose size is 2. */
function partName(mesh: Mesh, f: number, expert: boolean): string {
  const owner = (grid: readonly string[]) => grid.find((n) => mesh.axes[n]!.includes(f));
  const name = expert ? (owner(expertAxes) ?? owner(denseAxes)) : (owner(denseAxes) ?? owner(expertAxes));
  return mesh.axes[name!]!.length === 1 ? name! : `${name}/${mesh.subAxes[f]!.size}@${mesh.subAxes[f]!.stride}`;
}

/** All groups of some axes, over all stages, as lists of ranks. `pp` may be among the axes. */
export function groups(mesh: Mesh, axes: readonly string[]): number[][] {
  const fs = axes.flatMap((a) => (a === "pp" ? [] : mesh.axes[a]!));
  const stages = mesh.world / mesh.per_stage;
  const seen = new Set<number>();
  const within: number[][] = [];
  for (let r = 0; r < mesh.per_stage; r++) {
    if (seen.has(r)) continue;
    const g = groupMembers(mesh, r, fs);
    for (const m of g) seen.add(m);
    within.push(g);
  }
  const ascending = (a: number, b: number) => a - b;
  const at = (g: number[], s: number) => g.map((n) => rankAt(mesh, s, n));
  const all = Array.from({ length: stages }, (_, s) => s);
  const found = axes.includes("pp")
    ? within.map((g) => all.flatMap((s) => at(g, s)).sort(ascending))
    : all.flatMap((s) => within.map((g) => at(g, s)));
  return found.sort((a, b) => a[0]! - b[0]!);
}

/** Text of the mesh: sizes, factors, and which ranks form the groups of each axis. */
export function printMesh(mesh: Mesh): string {
  const list = (g: number[]) => {
    const step = g.length > 1 ? g[1]! - g[0]! : 1;
    const even = g.every((r, i) => r === g[0]! + i * step);
    return even && g.length > 2 ? `[${g[0]}..${g.at(-1)}${step > 1 ? ` by ${step}` : ""}]` : `[${g.join(",")}]`;
  };
  const line = (axis: string) => {
    const gs = groups(mesh, [axis]);
    const crossing = gs.filter((g) => new Set(g.map((r) => Math.floor(r / mesh.gpus_per_node))).size > 1).length;
    const shown = gs.slice(0, 8).map(list).join(" ") + (gs.length > 8 ? ` … ${gs.length} groups` : "");
    return `  ${axis.padEnd(4)} ${String(mesh.sizes[axis]).padStart(5)}  ${shown}${crossing ? `  (${crossing} of ${gs.length} cross nodes)` : ""}`;
  };
  const factorsOf = (grid: readonly string[]) => grid.flatMap((a) => mesh.axes[a]!.map((f) => mesh.subAxes[f]!));
  const product = (fs: Mesh["subAxes"]) => fs.map((f) => `${f.size}@${f.stride}`).join(" x ") || "1";
  const subAxes = hasSeparateGrids(mesh)
    ? [denseAxes, expertAxes].map((grid) => product(factorsOf(grid))).join(" and ")
    : product(mesh.subAxes);
  return [
    `mesh: ${mesh.world} ranks, ${mesh.per_stage} in a stage, factors ${subAxes}`,
    " dense grid",
    ...denseAxes.map(line),
    " expert grid",
    ...expertAxes.map(line),
    " both",
    line("pp"),
    "",
  ].join("\n");
}
