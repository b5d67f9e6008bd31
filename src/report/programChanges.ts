/** Compares the instructions of two plans. They are matched by id; a change that repeats over layers and stages is reported once. */
import { pairsOf } from "../../schemas/effects.ts";
import type { Collective, Instruction, Program } from "../../schemas/plan.ts";
import { blocksOf, instructionsOf } from "../../schemas/program.ts";
import { membersOf } from "../../schemas/tensorLists.ts";
import { type BufferTable, buffersOf } from "../analysis/bufferTable.ts";
import { anyLayerOrigin, layerOf } from "../analysis/layerNames.ts";
import { anyLayer } from "../analysis/layerText.ts";
import { ops } from "../ops/index.ts";
import { bytesText } from "../units.ts";
import { type BlockPhase, phases, shapeText } from "./programText.ts";

/** An instruction that one plan lacks, or that differs; equal changes of several layers and stages are one. */
export interface ProgramChange {
  readonly change: "added" | "removed" | "changed";
  readonly phase: BlockPhase;
  /** The id, with `layers.*` if the change applies to all of `layers`. */
  readonly id: string;
  readonly does: string;
  readonly kind: Instruction["kind"];
  readonly layers: readonly number[];
  readonly stages: readonly number[];
  readonly differences: readonly { readonly what: string; readonly old: string; readonly new: string }[];
}

/** An instruction of a stage. */
interface Placed {
  readonly stage: number;
  readonly instruction: Instruction;
  readonly buffers: BufferTable;
  readonly program: Program;
}

/** Returns the changes between the programs of two plans. */
export function programChanges(a: readonly Program[], b: readonly Program[]): ProgramChange[] {
  const found = new Map<string, ProgramChange & { layers: number[]; stages: number[] }>();
  const note = (
    change: ProgramChange["change"],
    phase: BlockPhase,
    id: string,
    { stage, instruction, buffers }: Placed,
    differences: ProgramChange["differences"],
  ): void => {
    const layer = layerOf(instruction, buffers);
    const [name, does, { kind }] = [anyLayer(id, layer), doing(instruction), instruction];
    const key = JSON.stringify([change, phase, name, does, differences]);
    const entry = found.get(key) ?? { change, phase, id: name, does, kind, layers: [], stages: [], differences };
    if (layer !== undefined) entry.layers.push(layer);
    if (!entry.stages.includes(stage)) entry.stages.push(stage);
    found.set(key, entry);
  };
  for (const phase of phases) {
    const [before, after] = [placed(a, phase), placed(b, phase)];
    for (const id of new Set([...before.keys(), ...after.keys()])) {
      const olds = before.get(id) ?? [];
      const news = after.get(id) ?? [];
      for (const old of olds) {
        const same = news.find((n) => n.stage === old.stage) ?? moved(old, olds, news);
        if (!same) note("removed", phase, id, old, []);
        else if (!areAlike(old, same)) {
          const differences = factChanges(old, same);
          if (differences.length > 0) note("changed", phase, id, same, differences);
        }
      }
      for (const added of news) {
        if (!olds.some((o) => o.stage === added.stage) && !moved(added, news, olds)) note("added", phase, id, added, []);
      }
    }
  }
  return [...found.values()];
}

/** Layers move between stages if the number of stages differs, so instructions with an id that is unique in both plans are matched. */
function moved(one: Placed, own: readonly Placed[], [other, ...more]: readonly Placed[]): Placed | undefined {
  return own.length === 1 && more.length === 0 && other?.stage !== one.stage ? other : undefined;
}

function placed(programs: readonly Program[], phase: BlockPhase): Map<string, Placed[]> {
  const all = new Map<string, Placed[]>();
  for (const program of programs) {
    const { stage } = program;
    const buffers = buffersOf(program);
    for (const { kind, instructions } of blocksOf(program)) {
      if (kind !== phase) continue;
      for (const instruction of instructions.flatMap(tensorsApart)) {
        const one = { stage, instruction, buffers, program };
        const before = all.get(instruction.id);
        if (before) before.push(one);
        else all.set(instruction.id, [one]);
      }
    }
  }
  return all;
}

/**
 * Returns a list of tensors as an instruction for each, named by what it updates or adds up; any other instruction as itself. A parameter more then adds
 * one, and does not change what comes behind it in a list.
 */
function tensorsApart(i: Instruction): Instruction[] {
  if (i.kind !== "compute" || i.tensors === undefined) return [i];
  const { inputs, outputs } = ops[i.op];
  const [name = ""] = [...outputs, ...inputs].flatMap((o) => (o.any ? [o.name] : []));
  return membersOf(i).map((one) => ({ ...one, id: `${one.writes[name] ?? one.reads[name] ?? i.id}.${i.op}` }));
}

/**
 * Returns whether two instructions have equal facts, without their texts: most instructions of two plans are equal. False for some that are equal;
 * then `factChanges` finds no difference.
 */
function areAlike(a: Placed, b: Placed): boolean {
  const [x, y] = [a.instruction, b.instruction];
  if (a.stage !== b.stage || x.kind !== y.kind || x.only !== y.only || x.waits || y.waits) return false;
  const isSame = (id: string | undefined, other: string | undefined): boolean => {
    if (id === undefined || id !== other) return false;
    const [own, its] = [a.buffers.get(id), b.buffers.get(id)];
    return own.dtype === its.dtype && own.layer === its.layer && own.ragged === its.ragged && areEqual(own.shape, its.shape);
  };
  if (x.kind === "compute" && y.kind === "compute")
    return (
      x.op === y.op &&
      hasEqual(x.reads, y.reads, isSame) &&
      hasEqual(x.writes, y.writes, isSame) &&
      hasEqual(x.attrs, y.attrs, (n, m) => n === m) &&
      areEqual(x.accumulates ?? [], y.accumulates ?? [])
    );
  if (x.kind === "collective" && y.kind === "collective") return isSame(x.from, y.from) && isSame(x.to, y.to) && areEqualCollectives(x, y);
  if (x.kind === "compute" || x.kind === "collective" || y.kind === "compute" || y.kind === "collective") return false;
  return isSame(x.buffer, y.buffer) && x.peer === y.peer && x.channel === y.channel && x.bytes === y.bytes;
}

const areEqual = <T>(a: readonly T[], b: readonly T[]): boolean => a.length === b.length && a.every((value, at) => value === b[at]);

/** Returns whether two records have the same keys, and `isSame` for each pair of values. */
function hasEqual<T>(
  a: Readonly<Record<string, T>>,
  b: Readonly<Record<string, T>>,
  isSame: (a: T | undefined, b: T | undefined) => boolean,
): boolean {
  let keys = 0;
  for (const key in a) {
    if (!Object.hasOwn(b, key) || !isSame(a[key], b[key])) return false;
    keys++;
  }
  for (const _ in b) keys--;
  return keys === 0;
}

/** What two collectives must have in common, beside their buffers, to be equal. */
const collectiveFields = ["name", "how", "axes", "stream", "bytes"] as const;

function areEqualCollectives(x: Collective, y: Collective): boolean {
  const { op, because, path, layer } = x.why;
  return (
    collectiveFields.every((field) => x[field] === y[field]) &&
    pairsOf(x).length === pairsOf(y).length &&
    op === y.why.op &&
    because === y.why.because &&
    path === y.why.path &&
    layer === y.why.layer
  );
}

function doing(i: Instruction): string {
  switch (i.kind) {
    case "compute":
      return i.op;
    case "collective":
      return i.name;
    default:
      return i.kind;
  }
}

/** Layers of the asynchronous collectives of a program by id, found once. */
const streamLayers = new WeakMap<Program, ReadonlyMap<string, number | undefined>>();

/** Returns the asynchronous collectives that an instruction waits for, without their layers. */
function waitsText(waits: readonly string[], program: Program, buffers: BufferTable): string {
  const layers =
    streamLayers.get(program) ??
    new Map(instructionsOf(program).flatMap((i) => (i.kind === "collective" && i.stream ? [[i.id, layerOf(i, buffers)] as const] : [])));
  streamLayers.set(program, layers);
  return waits.map((id) => anyLayer(id, layers.get(id))).join(" ");
}

/** Returns the texts of an instruction for comparison, without the layers in names. */
function factsOf({ instruction: i, buffers, program }: Placed): Map<string, string> {
  const facts = new Map<string, string>();
  const operand = (name: string, id: string): void => {
    const buffer = buffers.get(id);
    facts.set(`${name} shape`, shapeText(buffer));
    facts.set(`${name} dtype`, buffer.dtype);
    facts.set(`${name} buffer`, anyLayer(id, buffer.layer));
  };
  facts.set("does", doing(i));
  facts.set("waits for", i.waits ? waitsText(i.waits, program, buffers) : "");
  facts.set("runs", i.only ?? "");
  switch (i.kind) {
    case "compute":
      for (const [name, id] of Object.entries(i.reads)) operand(name, id);
      for (const [name, id] of Object.entries(i.writes)) operand(name, id);
      for (const [name, value] of Object.entries(i.attrs)) facts.set(`attribute ${name}`, String(value));
      facts.set("accumulates", (i.accumulates ?? []).join(" "));
      break;
    case "collective":
      operand("from", i.from);
      operand("to", i.to);
      facts.set("pairs", i.more ? String(1 + i.more.length) : "");
      facts.set("stream", i.stream ?? "");
      facts.set("how", i.how);
      facts.set("axes", i.axes);
      facts.set("bytes", bytesText(i.bytes));
      facts.set("needed by", anyLayerOrigin(i.why));
      break;
    case "send":
    case "recv":
      operand("buffer", i.buffer);
      facts.set("peer", `stage ${i.peer}`);
      facts.set("channel", i.channel);
      facts.set("bytes", bytesText(i.bytes));
      break;
  }
  return facts;
}

function factChanges(a: Placed, b: Placed): { what: string; old: string; new: string }[] {
  const changes = a.stage === b.stage ? [] : [{ what: "stage", old: String(a.stage), new: String(b.stage) }];
  const [before, after] = [factsOf(a), factsOf(b)];
  for (const what of new Set([...before.keys(), ...after.keys()])) {
    const [old, now] = [before.get(what) ?? "none", after.get(what) ?? "none"];
    if (old !== now) changes.push({ what, old, new: now });
  }
  return changes;
}
