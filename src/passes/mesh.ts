/**
 * Mesh: two grids over the same ranks (dense: tp, cp, dp; expert: etp, ep, edp; both: pp) and the sub-axes that both are products
 * of. An axis is a set of sub-axes, so a value may be sharded by dense and expert axes without a conversion. If the strides of the
 * grids do not nest, the grids share no sub-axis, and a regrid converts tokens between them (ops/regrid.ts).
 * The first axis has stride 1, as in Megatron Core. Sub-axes are factors of the number of a rank within its stage, so they do not
 * depend on the order of pipeline stages among the axes.
 */
import { nodesOfDispatch } from "../../schemas/experts.ts";
import type { Job } from "../../schemas/job.ts";
import { gridAxisNames } from "../../schemas/meshAxes.ts";
import type { MeshAxis } from "../../schemas/plan.ts";
import { groupMembers, type MeshData, rankAt, subAxisOf } from "../../schemas/sharding.ts";
import { invariant, type Value } from "../ops/op.ts";
import { Repeats } from "../repeats.ts";

/** The mesh as the plan stores it. */
export type Mesh = MeshData;
/** An axis that consists of sub-axes: any but pp. */
export type GridAxis = keyof Mesh["axes"];
/** Axes of the dense grid, ascending stride. */
export const denseAxes = ["tp", "cp", "dp"] as const;
/** Axes of the expert grid, ascending stride. */
export const expertAxes = ["etp", "ep", "edp"] as const;

type Meshed = Pick<Job, "parallel" | "cluster"> & {
  readonly model: Pick<Job["model"], "kv_heads"> & { readonly moe?: Job["model"]["moe"] };
};

/** Returns how many neighbouring tensor ranks hold copies of one key/value head; 1 if there are at least as many heads as ranks. */
const copiesOfHead = ({ model: { kv_heads }, parallel: { tensor } }: Pick<Meshed, "model" | "parallel">): number =>
  tensor % kv_heads === 0 ? tensor / kv_heads : 1;

/** Returns the sub-axes between 1 and each of the bounds, ascending stride. */
function subAxesBetween(bounds: readonly number[]): Mesh["subAxes"] {
  let stride = 1;
  return [...new Set(bounds)]
    .filter((to) => to !== 1)
    .sort((a, b) => a - b)
    .map((to) => {
      const subAxis = { stride, size: to / stride };
      stride = to;
      return subAxis;
    });
}
const hasIntegerSizes = (fs: Mesh["subAxes"]): boolean => fs.every((f) => Number.isInteger(f.size));

/** Builds the mesh of a job that passed all rules. Throws an invariant if the axes have no common sub-axes. */
export function buildMesh({ model, parallel: p, cluster }: Meshed): Mesh {
  const perStage = p.tensor * p.context * p.data;
  const copies = copiesOfHead({ model, parallel: p });
  const sizes: Mesh["sizes"] = {
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
  const spansOf = (grid: readonly GridAxis[]) => {
    let stride = 1;
    return grid.map((name) => ({ from: stride, to: (stride *= sizes[name]) }));
  };
  const [dense, expert] = [spansOf(denseAxes), spansOf(expertAxes)];
  const instances = perStage / p.optimizer_instances;
  const boundsOf = (spans: typeof dense, ...more: number[]) => [...spans.map((s) => s.to), instances, ...more];
  // rows that are sent once to each node are exchanged between nodes, and inside each
  const nodes = nodesOfDispatch({ model, parallel: p, cluster });
  const [denseBounds, expertBounds] = [boundsOf(dense, copies), boundsOf(expert, ...(nodes ? [p.expert_tensor * nodes.perNode] : []))];
  const shared = subAxesBetween([...denseBounds, ...expertBounds]);
  const isNested = hasIntegerSizes(shared);
  // if the strides of one grid do not divide those of the other, each grid has its own sub-axes
  const [ofDense, ofExpert] = isNested ? [shared, []] : [subAxesBetween(denseBounds), subAxesBetween(expertBounds)];
  const subAxes = [...ofDense, ...ofExpert];
  invariant(hasIntegerSizes(subAxes), `the axes are not products of sub-axes: strides ${denseBounds} and ${expertBounds}`);
  const numbered = subAxes.map((s, f) => ({ ...s, f }));
  const within = (own: typeof numbered, spans: typeof dense) =>
    spans.map(({ from, to }) => own.filter(({ stride, size }) => stride >= from && stride * size <= to));
  const [onTp = [], ...denseRest] = within(numbered.slice(0, ofDense.length), dense);
  const numbers = (own: typeof numbered) => own.map(({ f }) => f);
  const [cp = [], dp = []] = denseRest.map(numbers);
  const [etp = [], ep = [], edp = []] = within(numbered.slice(isNested ? 0 : ofDense.length), expert).map(numbers);
  const tp = numbers(onTp);
  const kv = numbers(onTp.filter(({ stride }) => stride >= copies));
  const copied = numbers(onTp.filter(({ stride }) => stride < copies));
  return {
    world: perStage * p.pipeline,
    per_stage: perStage,
    stage_stride: p.order === "tp-cp-ep-pp-dp" ? p.tensor * p.context : perStage,
    ...{ subAxes, axes: { tp, cp, dp, etp, ep, edp, kv, copies: copied }, sizes, gpus_per_node: cluster.gpus_per_node },
  };
}

const gridAxes: ReadonlySet<string> = new Set(gridAxisNames);
const isGridAxis = (axis: string): axis is GridAxis => gridAxes.has(axis);

/** Returns the sub-axes of an axis, ascending stride. Throws an invariant if the mesh has no such axis. */
export function subAxesOf({ axes }: Pick<Mesh, "axes">, axis: string): readonly number[] {
  invariant(isGridAxis(axis), () => `the mesh has no axis ${axis}`);
  return axes[axis];
}

/** Returns the number of ranks along an axis. Throws an invariant if the mesh has no such axis. */
export function sizeOfAxis({ sizes }: Pick<Mesh, "sizes">, axis: string): number {
  invariant(isGridAxis(axis), () => `the mesh has no axis ${axis}`);
  return sizes[axis];
}

/** Returns whether ranks along a sub-axis are on different nodes, unless some of its ranks share one. */
export function crossesNodes(mesh: Mesh, f: number): boolean {
  const { stride } = subAxisOf(mesh, f);
  return rankAt(mesh, 0, stride) - rankAt(mesh, 0, 0) >= mesh.gpus_per_node;
}

/** Returns whether the two grids share no sub-axis, because the strides of one do not divide those of the other. */
export const hasSeparateGrids = ({ subAxes, per_stage }: Pick<Mesh, "subAxes" | "per_stage">): boolean =>
  subAxes.reduce((n, f) => n * f.size, 1) !== per_stage;

/** Names of sets of sub-axes: a mesh has few, and each layout in a name has one per dim. */
const axesNames = new WeakMap<Mesh, Repeats<string>>();

/** Returns the name of a set of sub-axes: `tp`, `dp*cp`, `ep`. Names of the expert grid are preferred if `expert` is true. */
export function axesName(mesh: Mesh, fs: readonly number[], expert: boolean): string {
  const names = axesNames.get(mesh) ?? new Repeats<string>();
  axesNames.set(mesh, names);
  return names.of(`${expert ? "e" : "d"}${fs.join()}`, () => coveringName(mesh, fs, expert));
}

function coveringName(mesh: Mesh, fs: readonly number[], expert: boolean): string {
  const cover = (grid: readonly GridAxis[]) => {
    const names = grid.filter((n) => mesh.axes[n].length > 0 && mesh.axes[n].every((f) => fs.includes(f)));
    return names.flatMap((n) => mesh.axes[n]).length === fs.length ? names.join("*") : undefined;
  };
  const [first, second] = expert ? [expertAxes, denseAxes] : [denseAxes, expertAxes];
  return cover(first) ?? cover(second) ?? fs.map((f) => subAxisName(mesh, f, expert)).join("*");
}

/** Returns whether a value is named in expert axes: ragged rows and weights of experts. */
export const isExpert = (v: Value): boolean =>
  v.ragged > 0 || (v.shardAxes?.flat().some((a) => (expertAxes as readonly string[]).includes(a)) ?? false);

/** Returns the name of one sub-axis: its axis, or with size and stride if the axis has several: `dp/2@4`. */
function subAxisName(mesh: Mesh, f: number, expert: boolean): string {
  const owner = (grid: readonly GridAxis[]) => grid.find((n) => mesh.axes[n].includes(f));
  const name = expert ? (owner(expertAxes) ?? owner(denseAxes)) : (owner(denseAxes) ?? owner(expertAxes));
  invariant(name !== undefined, () => `no axis has the sub-axis ${f}`);
  const { size, stride } = subAxisOf(mesh, f);
  return mesh.axes[name].length === 1 ? name : `${name}/${size}@${stride}`;
}

/** Returns all groups of ranks along some axes, over all stages; `pp` may be one of them. */
export function groups(mesh: Mesh, axes: readonly MeshAxis[]): number[][] {
  const fs = axes.flatMap((a) => (a === "pp" ? [] : mesh.axes[a]));
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
  return found.sort(([a = 0], [b = 0]) => a - b);
}

/** Text of the mesh: sizes, factors, and which ranks form the groups of each axis. */
export function printMesh(mesh: Mesh): string {
  const list = (g: number[]) => {
    const [first = 0, second = first + 1] = g;
    const step = second - first;
    const even = g.every((r, i) => r === first + i * step);
    return even && g.length > 2 ? `[${first}..${g.at(-1)}${step > 1 ? ` by ${step}` : ""}]` : `[${g.join(",")}]`;
  };
  const line = (axis: MeshAxis) => {
    const gs = groups(mesh, [axis]);
    const crossing = gs.filter((g) => new Set(g.map((r) => Math.floor(r / mesh.gpus_per_node))).size > 1).length;
    const shown = gs.slice(0, 8).map(list).join(" ") + (gs.length > 8 ? ` … ${gs.length} groups` : "");
    return `  ${axis.padEnd(4)} ${String(mesh.sizes[axis]).padStart(5)}  ${shown}${crossing ? `  (${crossing} of ${gs.length} cross nodes)` : ""}`;
  };
  const factorsOf = (grid: readonly GridAxis[]) => grid.flatMap((a) => mesh.axes[a].map((f) => subAxisOf(mesh, f)));
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
