/** Formats programs, one line per instruction: id, operation, local shapes, bytes, and the origin of collectives. */
import type { Buffer, Compute, Instruction, Pair, Program } from "../../schemas/plan.ts";
import { type Block, blocksOf, microbatchBlocks } from "../../schemas/program.ts";
import { isOfFirst } from "../../schemas/tensorLists.ts";
import { type BufferTable, buffersOf } from "../analysis/bufferTable.ts";
import { collapseLayers, formFrom, formOf, type Line, layerOf } from "../analysis/layerNames.ts";
import { firstLayerOf } from "../analysis/stages.ts";
import { ops } from "../ops/index.ts";
import { bytesText, largest, plural } from "../units.ts";

/** The kinds of blocks in order. */
export const phases = [...microbatchBlocks, "step", "evaluation", "evaluation_step"] as const;
/** The kind of a block. */
export type BlockPhase = (typeof phases)[number];

/** Formats the name of a block: `forward`; with several chunks `forward of chunk 1`. */
export const blockName = ({ kind, chunk }: Block, { chunks }: Pick<Program, "chunks">): string =>
  kind === "step" || kind === "evaluation_step" || chunks.length === 1 ? kind.replace("_", " ") : `${kind} of chunk ${chunk}`;
/** Formats how often a block runs in a step. */
export const timesText = ({ kind }: Block): string => times[kind];
const times: Readonly<Record<BlockPhase, string>> = {
  ...{ forward: "for each microbatch", backward: "for each microbatch", weights: "for each microbatch", step: "once" },
  ...{ evaluation: "for each microbatch of an evaluation", evaluation_step: "once in each batch of an evaluation" },
};

/** Returns one line per instruction of a block. */
export function blockLines(program: Program, { instructions }: Block): Line[] {
  const buffers = buffersOf(program);
  const ids = Math.min(
    48,
    largest(instructions, (i) => i.id.length),
  );
  const names = largest(instructions, (i) => verb(i).length);
  return instructions.map((i) => {
    const layer = layerOf(i, buffers);
    const reader = i.kind === "compute" ? undefined : i.why.layer;
    const text = `  ${i.id.padEnd(ids)}  ${verb(i).padEnd(names)}  ${operands(i, buffers)}${when(i)}`;
    const isTransfer = i.kind === "send" || i.kind === "recv";
    // columns are padded to the longest id, and layer 10 is longer than layer 9
    const relative = isTransfer ? `${i.id} ${i.kind} ${i.peer - program.stage} ${operands(i, buffers)}${when(i)}` : text;
    return { layer, text, form: formOf(relative, layer, reader).replace(/ +/g, " ") };
  });
}

/** Formats the program of a stage; repeated layers are printed once. */
export const printProgram = (program: Program): string[] => programLines(program).map(({ text }) => text);

/** Returns the lines of `printProgram`. */
export function programLines(program: Program): Line[] {
  const printed = new Map<Block["kind"], { readonly chunk: number; readonly form: string }>();
  const blocks = blocksOf(program).flatMap((block) => {
    const { kind, chunk, instructions } = block;
    const head = `${blockName(block, program)}, ${timesText(block)}: ${instructions.length} instructions`;
    const lines = collapseLayers(blockLines(program, block));
    // a chunk that equals the preceding one is only named
    const form = formFrom(lines, firstLayerOf(program, chunk));
    const before = printed.get(kind);
    if (before?.form === form) return [plain(`${head}, as chunk ${before.chunk} on its layers`), plain("")];
    printed.set(kind, { chunk, form });
    return [plain(head), ...lines, plain("")];
  });
  const pairs = (program.pairs ?? []).map((pair) => plain(pairText(pair, program)));
  return [...blocks, ...pairs, ...(pairs.length > 0 ? [plain("")] : [])];
}

/** The turns of a pair that are printed. */
const SHOWN_TURNS = 8;
/** Formats how a forward and a backward alternate. */
function pairText({ forward, backward, turns }: Pair, { chunks }: Pick<Program, "chunks">): string {
  const of = (chunk: number): string => (chunks.length > 1 ? ` of chunk ${chunk}` : "");
  const shown = turns.slice(0, SHOWN_TURNS).join(" ");
  return `pair: forward${of(forward)} and backward${of(backward)} of an earlier microbatch, ${plural(turns.length, "turn")} of instructions: ${shown}${turns.length > SHOWN_TURNS ? " …" : ""}`;
}
/** A line that is not about a layer. */
const plain = (text: string): Line => ({ text, layer: undefined, form: text });

/** Returns a text that is equal for stages that differ only in their layers. */
export const programForm = (program: Program, lines: readonly Line[]): string => formFrom(lines, firstLayerOf(program));

/** Returns when an instruction runs, as the end of its line. */
function when({ waits = [], only }: Instruction): string {
  return `${only ? "  in the last microbatch" : ""}${waits.length > 0 ? `  waits for ${waits.join(", ")}` : ""}`;
}

function verb(i: Instruction): string {
  switch (i.kind) {
    case "compute":
      return i.op;
    case "collective":
      return `${`${i.name} ${i.axes}`.trimEnd()}${i.stream ? `, stream ${i.stream}` : ""}`;
    case "send":
      return `send to stage ${i.peer}`;
    case "recv":
      return `recv from stage ${i.peer}`;
  }
}

function operands(i: Instruction, buffers: BufferTable): string {
  const shape = (id: string): string => shapeText(buffers.get(id));
  // in the order of the signature, because a plan that is read from a file has sorted keys
  const named = (operand: Readonly<Record<string, string>>, signature: readonly { readonly name: string }[]): string =>
    signature.flatMap(({ name }) => (operand[name] === undefined ? [] : [`${name}${shape(operand[name])}`])).join(" ");
  switch (i.kind) {
    case "compute": {
      const { inputs, outputs } = ops[i.op];
      const types = [...new Set(outputs.flatMap((o) => buffers.find(i.writes[o.name] ?? "")?.dtype ?? []))].join(" ");
      const more = moreTensors(i);
      const kept = i.accumulates?.length ? `  keeps ${i.accumulates.filter(isOfFirst).join(" ")}` : "";
      return `${named(i.reads, inputs)} -> ${named(i.writes, outputs)} ${types}${more}${kept}`;
    }
    case "collective": {
      const more = i.more ? ` and ${plural(i.more.length, "pair")}` : "";
      return `${shape(i.from)} -> ${shape(i.to)}${more} ${buffers.get(i.to).dtype}  ${bytesText(i.bytes)}  for ${i.why.op}: ${i.why.because} (${i.why.path})`;
    }
    case "send":
    case "recv":
      return `${i.buffer} ${shape(i.buffer)} ${buffers.get(i.buffer).dtype}  ${bytesText(i.bytes)}  for ${i.why.op}: ${i.why.because} (${i.why.path})`;
  }
}

/** Formats how many tensors an instruction on a list has beside its first. */
export const moreTensors = ({ tensors = 1 }: Pick<Compute, "tensors">): string =>
  tensors > 1 ? ` and ${plural(tensors - 1, "more tensor")}` : "";

/** Formats a local shape. `<=` marks ragged rows, whose number is a bound. */
export const shapeText = ({ shape, ragged }: Pick<Buffer, "shape" | "ragged">): string => `[${ragged ? "<=" : ""}${shape.join(",")}]`;
