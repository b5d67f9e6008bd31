/** All fields of an instruction or a buffer, for `--op`. */
import { bytesOf } from "../../schemas/dtypes.ts";
import type { Instruction } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { isOfFirst, tensorOf } from "../../schemas/tensorLists.ts";
import { type BufferTable, buffersOf } from "../analysis/bufferTable.ts";
import { bytesText, ranges } from "../units.ts";
import type { FoundId } from "./findId.ts";
import { blockName, shapeText, timesText } from "./programText.ts";
import { bold, fitLines, fitTable } from "./textLayout.ts";

const runsText = {
  ...{ first: "in the first microbatch of a step", last: "in the last microbatch of a step" },
  logged: "in steps whose numbers are logged",
} as const;

/** Formats what was found. Stages with the same instruction are listed together. */
export function printInstructions({ id, instructions, buffers, alike }: FoundId, width: number): string[] {
  const columns = [{ head: "" }, { head: "" }];
  const table = (rows: readonly (readonly [string, string])[]): string[] => fitTable(columns, rows, { width, heads: false });
  const out = [...fitLines([bold(id)], width), ...(alike.length > 1 ? fitLines([`alike in ${alike.length} layers`], width) : [])];
  const blocks = new Map<string, { readonly rows: (readonly [string, string])[]; readonly stages: number[] }>();
  for (const { program, block, instruction } of instructions) {
    const rows = [
      ["block", `${blockName(block, program)}, ${timesText(block)}`] as const,
      ...rowsOf(instruction, buffersOf(program)),
      ...(instruction.only ? [["runs", runsText[instruction.only]] as const] : []),
      ...(instruction.waits ? [["waits for", instruction.waits.join(", ")] as const] : []),
    ];
    const key = JSON.stringify(rows);
    const same = blocks.get(key) ?? { rows, stages: [] };
    blocks.set(key, same);
    same.stages.push(program.stage);
  }
  for (const { rows, stages } of blocks.values()) out.push(...table([["stages", ranges(stages)], ...rows]), "");
  const [held] = buffers;
  if (held && instructions.length === 0) {
    const { buffer: b } = held;
    out.push(
      ...table([
        ["stages", ranges(buffers.map(({ program }) => program.stage))],
        ["kind", b.kind],
        ["shape", `${b.dtype} ${shapeText(b)} of [${b.sizes.join(",")}]`],
        ["bytes", bytesText(bytesOf[b.dtype] * elementsOf(b.shape))],
        ...(b.within === undefined ? [] : [["within", b.within] as const]),
        ...(b.part === undefined ? [] : [["part", `of ${b.part.of} from element ${b.part.at} on`] as const]),
        ...(b.rows === undefined ? [] : [["rows", b.rows] as const]),
      ]),
      "",
    );
  }
  return out;
}

/** Returns operands in the order of the tensors of a list: a plan file sorts them by name. */
const byTensor = (operands: Readonly<Record<string, string>>): [string, string][] =>
  Object.entries(operands).sort(([a], [b]) => tensorOf(a).n - tensorOf(b).n);

function rowsOf(i: Instruction, buffers: BufferTable): (readonly [string, string])[] {
  const operand = (id: string): string => `${id} ${buffers.get(id).dtype} ${shapeText(buffers.get(id))}`;
  const origin = (why: Extract<Instruction, { kind: "collective" }>["why"]): (readonly [string, string])[] => [
    ["needed by", why.op],
    ["because", `${why.because} (${why.path})`],
  ];
  switch (i.kind) {
    case "compute":
      return [
        ["op", i.op],
        ...(i.tensors === undefined ? [] : [["tensors", String(i.tensors)] as const]),
        ["kernel", i.kernel + (i.first_kernel && i.first_kernel !== i.kernel ? `; for the first microbatch ${i.first_kernel}` : "")],
        ...byTensor(i.reads).map(([name, id]) => [`reads ${name}`, operand(id)] as const),
        ...byTensor(i.writes).map(([name, id]) => [`writes ${name}`, operand(id)] as const),
        ...Object.entries(i.attrs).map(([name, value]) => [`attribute ${name}`, String(value)] as const),
        ...(i.accumulates?.length ? [["adds to", i.accumulates.filter(isOfFirst).join(" ")] as const] : []),
      ];
    case "collective":
      return [
        ["collective", `${i.name} (${i.how}) over ${i.axes}`],
        ["from", operand(i.from)],
        ["to", operand(i.to)],
        ...(i.more ?? []).flatMap(({ from, to }) => [["from", operand(from)] as const, ["to", operand(to)] as const]),
        ["bytes", bytesText(i.bytes)],
        ...(i.stream ? [["stream", i.stream] as const] : []),
        ...origin(i.why),
      ];
    case "send":
    case "recv":
      return [
        ["transfer", `${i.kind} ${i.kind === "send" ? "to" : "from"} stage ${i.peer}, channel ${i.channel}`],
        ["buffer", operand(i.buffer)],
        ["bytes", bytesText(i.bytes)],
        ...origin(i.why),
      ];
    default:
      return i satisfies never;
  }
}
