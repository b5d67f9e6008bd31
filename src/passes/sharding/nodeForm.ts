/** The form of a node: all that its sharding depends on, without names. Equal layers have nodes of equal forms. */
import type { Node, Value } from "../../ops/op.ts";
import type { CopySums, NodeUses, OperandUse } from "./dimChoice.ts";
import type { Placements } from "./placements.ts";

/** Returns the form of a node: its op, the sizes of its dims, its declarations, and the layouts of its operands and of the state that it updates. */
export function nodeForm({ node, ins, outs }: NodeUses, placements: Placements, copySums: CopySums): string {
  const { op, size, pins = [], ring } = node;
  let form: string = op.name;
  for (const name of sizesOf(node.op, ins, outs)) form += ` ${size[name]}`;
  for (const pin of pins) form += ` pin ${pin.axis} ${pin.across ?? ""} ${pin.dim ?? ""}`;
  if (ring) form += ` ring ${ring.dim} ${ring.as}`;
  for (const { value } of ins) {
    form += `|${placements.numberOf(value)} ${value.leaf?.kind ?? ""}${value.local ? "local" : ""}`;
    const sums = copySums.get(value);
    if (sums) form += ` sums ${sums.join()}`;
  }
  for (const { value } of outs) form += value.updates ? `>${placements.numberOf(value.updates)} ${kindOf(value.updates)}` : ">";
  return form;
}

const kindOf = ({ leaf }: Value): string => leaf?.kind ?? "";

/** The names of the sizes in the signature of an op, by the number of dims of each operand: `...` stands for any number. */
const names = new WeakMap<Node["op"], Map<string, readonly string[]>>();

/** Returns the names of the sizes that the operands of a node have: dims, inner factors and numbers of sharers. Other attributes have no part in sharding. */
function sizesOf(op: Node["op"], ins: readonly OperandUse[], outs: readonly OperandUse[]): readonly string[] {
  const byDims = names.get(op) ?? new Map<string, readonly string[]>();
  names.set(op, byDims);
  let key = "";
  for (const { operand } of ins) key += ` ${operand.dimSpecs.length}`;
  const known = byDims.get(key);
  if (known) return known;
  const specs = [...ins, ...outs].flatMap(({ operand }) => operand.dimSpecs);
  const found = [...new Set(specs.flatMap(({ dim, inner, shared }) => [dim, ...inner, ...(shared === undefined ? [] : [shared])]))];
  byDims.set(key, found);
  return found;
}
