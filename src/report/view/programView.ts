/** The programs of a plan for the page: blocks as lists of parts, where equal layers, chunks and stages share their parts. */
import { readsOf, writesOf } from "../../../schemas/effects.ts";
import type { Instruction, Plan, Program } from "../../../schemas/plan.ts";
import { type Block, blocksOf } from "../../../schemas/program.ts";
import { membersOf } from "../../../schemas/tensorLists.ts";
import { type BufferTable, buffersOf } from "../../analysis/bufferTable.ts";
import { costOf } from "../../analysis/cost.ts";
import { layerOf } from "../../analysis/layerNames.ts";
import { anyLayer, fromLayer } from "../../analysis/layerText.ts";
import { firstLayerOf } from "../../analysis/stages.ts";
import { aligned, blockLifetimes } from "../../passes/memory.ts";
import { moreTensors, shapeText } from "../programText.ts";
import { tensorsOf } from "../tensors.ts";
import { explainId } from "../why.ts";
import { keyOfCompute } from "../whyKeys.ts";
import type { BlockForm, BlockView, BufferLife, HeldTensor, InstructionView, InstructionWhy, PartView, StageView } from "./planView.ts";

/** The programs of all stages. */
export interface ProgramsView {
  readonly parts: readonly PartView[];
  readonly forms: readonly BlockForm[];
  readonly stages: readonly StageView[];
}

/** Returns the programs of a plan, equal parts once. */
export function programsView(plan: Plan): ProgramsView {
  const shared = new SharedParts(plan);
  const stages = plan.programs.map((program): StageView => {
    const buffers = buffersOf(program);
    const layers = new Map(blocksOf(program).flatMap(({ instructions }) => instructions.map((i) => [i.id, layerOf(i, buffers)] as const)));
    const lifetimes = blockLifetimes(program);
    const blocks = lifetimes.map(({ block, lives }): BlockView => {
      const base = firstLayerOf(program, block.chunk);
      const parts = layerRuns(block.instructions, buffers).map(({ layer, instructions }) => ({
        part: shared.partOf({ program, block, buffers, layers }, instructions, layer ?? base),
        layer: layer === undefined ? null : layer - base,
      }));
      const alive = lives.map(
        ({ buffer, from, to }): BufferLife => ({
          ...{ id: fromLayer(buffer.id, buffer.layer, base), kind: buffer.kind, bytes: aligned(buffer), from, to },
        }),
      );
      return { kind: block.kind, chunk: block.chunk, form: shared.formOf({ parts, lives: alive }), base };
    });
    return { blocks, ...(program.pairs && { pairs: program.pairs }), state: stateOf(program) };
  });
  return { parts: shared.parts, forms: shared.forms, stages };
}

/** Where instructions are. */
interface Placed {
  readonly program: Program;
  readonly block: Block;
  readonly buffers: BufferTable;
  /** The layers of all instructions of the program. */
  readonly layers: ReadonlyMap<string, number | undefined>;
}

/** Parts and forms by their text. */
class SharedParts {
  readonly parts: PartView[] = [];
  readonly forms: BlockForm[] = [];
  readonly #plan: Plan;
  readonly #partsByText = new Map<string, number>();
  readonly #formsByText = new Map<string, number>();

  constructor(plan: Plan) {
    this.#plan = plan;
  }

  /** Returns the number of the part with these instructions. `layer`: what layers in ids are relative to. */
  partOf(placed: Placed, instructions: readonly Instruction[], layer: number): number {
    const views = instructions.map((i) => instructionView(this.#plan, placed, i, layer));
    return numberOf(this.#partsByText, this.parts, JSON.stringify(views), () => ({
      // an answer to `why` costs a pass over the program: once for each part
      instructions: views.map((view, n) => ({ ...view, ...this.#why(placed, instructions[n], layer) })),
    }));
  }

  formOf(form: BlockForm): number {
    return numberOf(this.#formsByText, this.forms, JSON.stringify(form), () => form);
  }

  #why({ program, block, buffers }: Placed, instruction: Instruction | undefined, layer: number): { readonly why?: InstructionWhy } {
    if (!instruction || instruction.kind === "compute") return {};
    const { id } = instruction;
    const own = layerOf(instruction, buffers);
    const alike = [{ id, layer: own, form: anyLayer(id, own) }];
    const answer = explainId(this.#plan, { id, alike, instructions: [{ program, block, instruction }], buffers: [] });
    const { because, sharding, link, share, seconds_per_step, removed_by, key } = answer;
    const why: InstructionWhy = {
      because: because.map((sentence) => fromLayer(sentence, instruction.why.layer, layer)),
      ...{ share, removed_by, value: key.value },
      ...(sharding === undefined ? {} : { sharding }),
      ...(link === undefined ? {} : { link }),
      ...(seconds_per_step === undefined ? {} : { seconds_per_step }),
    };
    return { why };
  }
}

function numberOf<T>(byText: Map<string, number>, all: T[], text: string, make: () => T): number {
  const known = byText.get(text);
  if (known !== undefined) return known;
  byText.set(text, all.length);
  return all.push(make()) - 1;
}

/** Splits instructions into runs of one layer, or of none. */
function layerRuns(instructions: readonly Instruction[], buffers: BufferTable) {
  const runs: { readonly layer: number | undefined; readonly instructions: Instruction[] }[] = [];
  for (const instruction of instructions) {
    const layer = layerOf(instruction, buffers);
    const last = runs.at(-1);
    if (last && last.layer === layer) last.instructions.push(instruction);
    else runs.push({ layer, instructions: [instruction] });
  }
  return runs;
}

function instructionView({ mesh }: Plan, { program, block, buffers, layers }: Placed, i: Instruction, layer: number): InstructionView {
  const name = (id: string): string => fromLayer(id, buffers.get(id).layer, layer);
  const shape = (id: string): string => `${buffers.get(id).dtype}${shapeText(buffers.get(id))}`;
  const list = (ids: readonly string[]): string => ids.map(shape).join(" ");
  const { flops, bytes } = costOf(i, mesh, buffers);
  const [reads, writes] = [readsOf(i), writesOf(i, buffers)];
  const waits = i.waits?.map((id) => fromLayer(id, layers.get(id), layer));
  const common = {
    id: fromLayer(i.id, layerOf(i, buffers), layer),
    reads: reads.map(name),
    writes: writes.map(name),
    flops,
    bytes,
    ...(waits && { waits }),
    ...(i.only && { only: i.only }),
  } as const;
  switch (i.kind) {
    case "compute": {
      const { path, because } = keyOfCompute(i, block.kind);
      const [shown = i] = membersOf(i);
      const shapes = `${list(Object.values(shown.reads))} -> ${list(Object.values(shown.writes))}${moreTensors(i)}`;
      return { ...common, kind: "compute", does: i.op, shapes, kernel: i.kernel, path, because };
    }
    case "collective": {
      const { how, axes, subAxes, world, why, stream } = i;
      const shapes = `${shape(i.from)} -> ${shape(i.to)}`;
      const over = { how, axes, subAxes, ...(world ? { world: true as const } : {}), ...(stream && { stream }) };
      return {
        ...common,
        kind: "collective",
        does: i.name,
        shapes,
        ...over,
        path: why.path,
        because: fromLayer(why.because, why.layer, layer),
      };
    }
    case "send":
    case "recv": {
      const { why } = i;
      const peer = i.peer - program.stage;
      return {
        ...common,
        kind: i.kind,
        does: i.kind,
        shapes: shape(i.buffer),
        peer,
        axes: "pp",
        path: why.path,
        because: fromLayer(why.because, why.layer, layer),
      };
    }
    default:
      return i satisfies never;
  }
}

const stateKinds: readonly string[] = ["parameter", "gradient", "optimizer"];
const stateOf = (program: Program): HeldTensor[] =>
  tensorsOf(program)
    .filter(({ kind }) => stateKinds.includes(kind))
    .map((t) => ({
      id: t.id,
      kind: t.kind,
      shape: `${t.dtype}${shapeText({ shape: [...t.shape], ragged: t.ragged ? 1 : 0 })}`,
      count: t.count,
      bytes: t.total_bytes,
    }));

/** Returns how often each block of a program runs in a step. */
const timesOfBlock = ({ kind }: Pick<Block, "kind">, microbatches: number): number =>
  kind === "step" ? 1 : kind.startsWith("evaluation") ? 0 : microbatches;

/** Returns the instructions of a step with how often each runs. */
export const stepInstructions = (program: Program, microbatches: number) =>
  blocksOf(program).flatMap((block) => {
    const times = timesOfBlock(block, microbatches);
    return times === 0 ? [] : block.instructions.map((instruction) => ({ instruction, times }));
  });
