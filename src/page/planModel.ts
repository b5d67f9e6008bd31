/** A plan as the panels read it: programs with the ids of their layers, block runs by time, ranks of groups. Lists are made on first use. */
import type { MeshAxis } from "../../schemas/plan.ts";
import { groupMembers, numberInStage, rankAt, rankCoordinate, stageOfRank, subAxisOf } from "../../schemas/sharding.ts";
import type { BlockView, BufferLife, InstructionView, PlanView } from "../report/view/planView.ts";
import { StageRuns } from "./stageRuns.ts";

/** An instruction of a block of a stage. */
export interface PlacedView {
  readonly stage: number;
  readonly block: BlockView;
  /** Its place in the block. */
  readonly n: number;
  readonly id: string;
  readonly layer: number | null;
  /** Ids in it are relative to `layer`, or to the first layer of the chunk. */
  readonly view: InstructionView;
}

/** Instructions that stand together: a layer, or what is between layers. */
export interface ProgramSection {
  readonly part: number;
  readonly layer: number | null;
  readonly first: number;
  readonly instructions: readonly PlacedView[];
}

/** The axes of the mesh in the order of reports. */
export const axisNames = ["tp", "cp", "dp", "etp", "ep", "edp", "pp"] as const satisfies readonly MeshAxis[];
/** The name of one of them. */
export type AxisName = (typeof axisNames)[number];

/** A layer in texts of the page, relative to the layer or the chunk that the text belongs to (src/analysis/layerText.ts writes it). */
const relativeLayer = /\blayers\.([+-]\d+)/g;
/** Replaces relative layers in a text: `layers.+1.wq` after layer 3 becomes `layers.4.wq`. */
const inLayer = (text: string, layer: number): string => text.replace(relativeLayer, (_, n: string) => `layers.${layer + Number(n)}`);
/** Replaces relative layers in a text by `*`: `layers.+1.wq` becomes `layers.*.wq`. */
export const inAnyLayer = (text: string): string => text.replace(relativeLayer, "layers.*");

/** One plan of the page. */
export class PlanModel {
  readonly view: PlanView;
  readonly index: number;
  /** The block runs of each stage. */
  readonly runs: readonly StageRuns[];
  readonly #sections = new Map<string, ProgramSection[]>();
  readonly #equalSlots = new Map<number, number[]>();

  constructor(view: PlanView, index: number) {
    this.view = view;
    this.index = index;
    this.runs = view.timeline.stages.map((times) => new StageRuns(times));
  }

  get stages(): number {
    return this.view.stages.length;
  }
  get chunks(): number {
    return this.view.inspection.roles[0]?.chunks.length ?? 1;
  }

  /** Returns a block of a stage; undefined if the stage has none of this kind. */
  block(stage: number, kind: string, chunk: number): BlockView | undefined {
    return this.view.stages[stage]?.blocks.find((b) => b.kind === kind && b.chunk === chunk);
  }

  /** Returns the sections of a block in order. */
  sections(stage: number, block: BlockView): ProgramSection[] {
    const key = `${stage} ${block.kind} ${block.chunk}`;
    const known = this.#sections.get(key) ?? this.#readSections(stage, block);
    this.#sections.set(key, known);
    return known;
  }

  #readSections(stage: number, block: BlockView): ProgramSection[] {
    let n = 0;
    return (this.view.forms[block.form]?.parts ?? []).map(({ part, layer }) => {
      const first = n;
      const own = layer === null ? block.base : block.base + layer;
      const instructions = (this.view.parts[part]?.instructions ?? []).map(
        (view): PlacedView => ({ stage, block, n: n++, id: inLayer(view.id, own), layer: layer === null ? null : own, view }),
      );
      return { part, layer: layer === null ? null : own, first, instructions };
    });
  }

  /** Returns all instructions of a block. */
  instructions(stage: number, block: BlockView): PlacedView[] {
    return this.sections(stage, block).flatMap(({ instructions }) => instructions);
  }

  /** Returns an instruction by its place; undefined if the plan has none there. */
  find(stage: number, kind: string, chunk: number, id: string): PlacedView | undefined {
    const block = this.block(stage, kind, chunk);
    return block && this.instructions(stage, block).find((i) => i.id === id);
  }

  /** Returns an id that stands in an instruction with the layer that it means. */
  idIn({ view: _, layer, block }: PlacedView, text: string): string {
    return inLayer(text, layer ?? block.base);
  }

  /** Returns start and end of each instruction of a block, as shares of its time. */
  slots(stage: number, { kind, chunk, form }: BlockView): readonly number[] {
    const known = this.view.timeline.slots[stage]?.find((s) => s.kind === kind && s.chunk === chunk);
    if (known) return known.times;
    const equal = this.#equalSlots.get(form) ?? this.#readEqualSlots(form);
    this.#equalSlots.set(form, equal);
    return equal;
  }

  #readEqualSlots(form: number): number[] {
    const parts = this.view.forms[form]?.parts ?? [];
    const count = parts.reduce((sum, { part }) => sum + (this.view.parts[part]?.instructions.length ?? 0), 0);
    return Array.from({ length: 2 * count }, (_, i) => Math.ceil(i / 2) / count);
  }

  /** Returns the buffers that are alive in a block at some time. */
  lives({ form }: BlockView): readonly BufferLife[] {
    return this.view.forms[form]?.lives ?? [];
  }

  /** Returns the coordinate of a rank along an axis. */
  coordinate(rank: number, axis: AxisName): number {
    const { mesh } = this.view;
    if (axis === "pp") return stageOfRank(mesh, rank);
    let coordinate = 0;
    for (const f of [...mesh.axes[axis]].reverse())
      coordinate = coordinate * subAxisOf(mesh, f).size + rankCoordinate(mesh, numberInStage(mesh, rank), f);
    return coordinate;
  }

  /** Returns the ranks of the group of a rank along an axis, ascending. */
  group(rank: number, axis: AxisName): number[] {
    const { mesh } = this.view;
    if (axis === "pp") {
      const own = numberInStage(mesh, rank);
      return Array.from({ length: mesh.sizes.pp }, (_, stage) => rankAt(mesh, stage, own)).sort((a, b) => a - b);
    }
    return this.members(rank, mesh.axes[axis]);
  }

  /** Returns the ranks of the group of a rank along sub-axes, ascending. */
  members(rank: number, subAxes: readonly number[]): number[] {
    const { mesh } = this.view;
    const stage = stageOfRank(mesh, rank);
    return groupMembers(mesh, numberInStage(mesh, rank), subAxes)
      .map((n) => rankAt(mesh, stage, n))
      .sort((a, b) => a - b);
  }

  /** Returns the ranks that take part in an instruction of a rank: the group of a collective, both ends of a transfer, or the rank alone. */
  ranksOf({ stage, view }: PlacedView, rank: number): number[] {
    const { mesh } = this.view;
    if (view.kind === "collective") {
      if (view.world) return Array.from({ length: mesh.world }, (_, r) => r);
      return this.members(rank, view.subAxes ?? []);
    }
    if (view.kind === "compute") return [rank];
    return [rank, rankAt(mesh, stage + (view.peer ?? 0), numberInStage(mesh, rank))];
  }

  stageOf(rank: number): number {
    return stageOfRank(this.view.mesh, rank);
  }
  /** Returns the first rank of a stage. */
  firstRank(stage: number): number {
    return rankAt(this.view.mesh, stage, 0);
  }
  nodeOf(rank: number): number {
    return Math.floor(rank / this.view.mesh.gpus_per_node);
  }
}
