/** What a change of the mesh does to groups: their sizes, and whether they enter or leave nodes. */
import type { AxisView, Inspection } from "./inspect.ts";
import { linkText } from "./links.ts";

/** The change of one axis of the mesh. */
export interface PlacementChange {
  readonly axis: string;
  readonly old: PlacedAxis;
  readonly new: PlacedAxis;
  /** Whether groups now cross nodes, or no longer do. */
  readonly moved: "leaves the node" | "enters the node" | "more nodes" | "fewer nodes" | "stays";
}

interface PlacedAxis {
  /** Ranks of a group. */
  readonly ranks: number;
  readonly groups: number;
  /** The largest number of nodes that a group is on. */
  readonly nodes: number;
  readonly first_group: readonly number[];
}

/** Returns the axes whose groups differ. */
export function placementChanges(a: Inspection, b: Inspection): PlacementChange[] {
  return a.mesh.axes.flatMap((old) => {
    const now = b.mesh.axes.find(({ axis }) => axis === old.axis);
    if (!now) return [];
    const [before, after] = [placed(old), placed(now)];
    return JSON.stringify(before) === JSON.stringify(after)
      ? []
      : [{ axis: old.axis, old: before, new: after, moved: moveOf(before, after) }];
  });
}

const placed = ({ size, groups, nodes, first_group }: AxisView): PlacedAxis => ({ ranks: size, groups, nodes, first_group });

/** Groups of one rank are on one node; only groups that send can leave it. */
function moveOf(old: PlacedAxis, now: PlacedAxis): PlacementChange["moved"] {
  if (old.nodes === now.nodes) return "stays";
  if (now.nodes === 1) return "enters the node";
  if (old.nodes === 1) return "leaves the node";
  return now.nodes > old.nodes ? "more nodes" : "fewer nodes";
}

/** Returns a placement in words: `4 ranks across 2 nodes`. */
export const placedText = ({ ranks, nodes }: PlacedAxis): string =>
  ranks === 1 ? "1 rank" : `${ranks} ranks ${linkText({ ranks, nodes })}`;
