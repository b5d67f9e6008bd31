/** The lanes of a block run in the schedule: what runs in order, and below it each stream whose collectives run beside compute. */
import type { StreamName } from "../../schemas/plan.ts";
import type { PlacedView, PlanModel } from "./planModel.ts";

/** A lane: a stream, or `undefined` for what runs in order. */
export type StreamLane = StreamName | undefined;

const streamsByModel = new WeakMap<PlanModel, readonly StreamLane[]>();

/** Returns the lanes of a plan from above: in order, then its streams. */
export function streamsOf(model: PlanModel): readonly StreamLane[] {
  const known = streamsByModel.get(model);
  if (known) return known;
  const used = new Set(model.view.parts.flatMap(({ instructions }) => instructions.flatMap(({ stream }) => stream ?? [])));
  const lanes = [undefined, ...[...used].sort()];
  streamsByModel.set(model, lanes);
  return lanes;
}

/** The rectangle of a run that shows its instructions. */
export interface StripPlace {
  readonly top: number;
  readonly height: number;
}

/** Returns where the instructions of a run are in its row: below its name; with streams it takes more of the row. */
export function stripOf(model: PlanModel, row: StripPlace): StripPlace {
  const share = streamsOf(model).length > 1 ? 0.4 : 0.55;
  const top = row.top + Math.round(row.height * share);
  return { top, height: row.top + row.height - 2 - top };
}

/** Returns the rectangle of a lane in a strip. */
export function placeOfLane(model: PlanModel, { top, height }: StripPlace, stream: StreamLane): StripPlace {
  const lanes = streamsOf(model);
  const n = Math.max(0, lanes.indexOf(stream));
  const each = height / lanes.length;
  return { top: top + n * each, height: lanes.length > 1 ? Math.max(1, each - 1) : each };
}

/** Returns the lane at a height of a strip. */
export function laneUnder(model: PlanModel, { top, height }: StripPlace, y: number): StreamLane {
  const lanes = streamsOf(model);
  return lanes[Math.min(lanes.length - 1, Math.max(0, Math.floor(((y - top) / height) * lanes.length)))];
}

/** Returns the shortest instruction of a lane that runs at a share of a block; undefined for none. */
export function instructionAt(
  slots: readonly number[],
  instructions: readonly PlacedView[],
  lane: StreamLane,
  share: number,
): PlacedView | undefined {
  let best: PlacedView | undefined;
  let length = Number.POSITIVE_INFINITY;
  for (const [n, instruction] of instructions.entries()) {
    const [start, end] = [slots[2 * n] ?? 0, slots[2 * n + 1] ?? 0];
    if (instruction.view.stream !== lane || start > share || end < share || end - start >= length) continue;
    [best, length] = [instruction, end - start];
  }
  return best;
}
