/** Origins of collectives: the sharding decisions and the job keys behind them. */
import type { Node, Value } from "../../ops/op.ts";
import { denseAxes, expertAxes, type Mesh, subAxesOf } from "../mesh.ts";
import type { NodeUses, OperandUse, SubAxisChoice } from "./dimChoice.ts";
import type { Reason } from "./steps.ts";

/** The job key that sets the size of each axis. */
const keyOfAxis = {
  tp: "parallel.tensor",
  cp: "parallel.context",
  dp: "parallel.data",
  etp: "parallel.expert_tensor",
  ep: "parallel.expert",
  edp: "parallel.data",
} as const;

/** Returns the job key that set the size of the first of some sub-axes. Axes of the expert grid are preferred if `expert` is true. */
function pathOf(mesh: Mesh, [f]: readonly number[], expert: boolean): string {
  const grids = expert ? [...expertAxes, ...denseAxes] : [...denseAxes, ...expertAxes];
  const axis = f === undefined ? undefined : grids.find((a) => subAxesOf(mesh, a).includes(f));
  return axis ? keyOfAxis[axis] : "parallel";
}

/** Returns the origin of the reshard of an operand: the choices for the sub-axes that changed. */
export const operandReason =
  (mesh: Mesh, uses: NodeUses, { operand, value }: OperandUse, chosen: readonly SubAxisChoice[]) =>
  (changed: readonly number[]): Reason => {
    const { node } = uses;
    const because = chosen
      .filter(({ f }) => changed.includes(f))
      .map(({ dim, by }) =>
        dim !== undefined && operand.dimSpecs.some((s) => s.dim === dim && s.replicated) ? `${dim} is read completely` : by(uses),
      );
    return {
      op: `${node.id}.${operand.name}`,
      because: [...new Set(because)].join("; "),
      path: pathOf(mesh, changed, value.ragged > 0),
      position: positionOf(node),
    };
  };

/** Returns the position that the id of a node names. */
const positionOf = ({ namedAt, position }: Node): number => namedAt ?? position;

/** Returns the origin of the reshard of a result, for one reason over all sub-axes. `op` is named after `of`. */
export const resultReason =
  (mesh: Mesh, op: string, because: string, { ragged }: Pick<Value, "ragged">, of?: Value) =>
  (changed: readonly number[]): Reason => ({
    ...{ op, because, path: pathOf(mesh, changed, ragged > 0) },
    position: of?.node ? positionOf(of.node) : of?.leaf?.position,
  });
