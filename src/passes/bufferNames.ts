/** Layouts as parts of buffer names. */
import { type ShardedValue, variantText } from "./layout.ts";
import { axesName, type Mesh } from "./mesh.ts";

/** Returns the name of the sub-axes of a dim. If the outer one has the smaller stride, which is rare, each is named: `ep>edp`. */
export const dimAxesName = (mesh: Mesh, fs: readonly number[], expert: boolean): string =>
  fs.every((f, i) => i === 0 || f < (fs[i - 1] ?? f)) ? axesName(mesh, fs, expert) : fs.map((f) => axesName(mesh, [f], expert)).join(">");

/** Returns a layout as part of a name: `@dp,tp,-` gives the axes of each dim, `+tp` a pending sum, `^tp` a pending maximum. */
export function layoutText(mesh: Mesh, { layout, variant = {} }: ShardedValue, expert: boolean): string {
  const name = (fs: readonly number[]) => dimAxesName(mesh, fs, expert);
  const shardedBy = layout.shardedBy.map((fs) => (fs.length ? name(fs) : "-")).join(",");
  const sum = layout.partialSum.length ? `+${name(layout.partialSum)}` : "";
  const max = layout.partialMax.length ? `^${name(layout.partialMax)}` : "";
  return `@${shardedBy}${sum}${max}${variantText(variant, "")}`;
}
