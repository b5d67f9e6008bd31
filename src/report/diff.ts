/**
 * Compares two plans on four levels: job keys, placement of groups, the summary of each stage, instructions. Instructions are matched by id; a change that
 * repeats over layers and stages is reported once.
 */
import { isDeepStrictEqual } from "node:util";
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import type { Instruction, Plan, Program } from "../../schemas/plan.ts";
import { blocksOf, instructionsOf } from "../../schemas/program.ts";
import { BufferTable } from "../analysis/bufferTable.ts";
import { anyLayerOrigin, layerOf } from "../analysis/layerNames.ts";
import { anyLayer } from "../analysis/layerText.ts";
import { memoryKinds } from "../analysis/memoryBreakdown.ts";
import { bytesText } from "../units.ts";
import { type Consequence, consequencesOf } from "./consequences.ts";
import type { DiffLevel } from "./diffLevels.ts";
import { classText, namedParts } from "./estimateView.ts";
import { type Inspection, inspectPlan, type RoleView } from "./inspect.ts";
import { trafficOf } from "./overview.ts";
import { type PlacementChange, placementChanges } from "./placementChanges.ts";
import { type BlockPhase, phases, shapeText } from "./programText.ts";

/** A key of the job with another value. */
export interface FieldChange {
  readonly path: string;
  /** Undefined if the key does not exist. */
  readonly old?: unknown;
  readonly new?: unknown;
}

/** A number of the summary of some stages that differs. */
export interface SummaryChange {
  /** The stages that have this change. */
  readonly stages: readonly number[];
  readonly what: string;
  readonly unit: "bytes" | "flops" | "count" | "seconds";
  readonly old: number;
  readonly new: number;
}

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

/** The version of the JSON of `diff`: a minor version adds keys. */
export const DIFF_VERSION = "1.1";

/** The differences of two plans. */
export interface PlanDiff {
  readonly format_version: typeof DIFF_VERSION;
  readonly changes: boolean;
  readonly names: readonly [string, string];
  readonly digests: readonly [string, string];
  /** The plan sections with different digests. */
  readonly sections: readonly string[];
  readonly job: readonly FieldChange[];
  /** What the change costs, the gravest first. */
  readonly consequences: readonly Consequence[];
  readonly placement: readonly PlacementChange[];
  readonly summary: readonly SummaryChange[];
  readonly program: readonly ProgramChange[];
}

/** Options of `diffPlans`. */
export interface DiffOptions {
  /** Whether instructions are compared, which takes most of the time. Default: true. */
  readonly hasProgram?: boolean;
  /** The device profile by which the steps of a plan are estimated. Default: none, and no times are compared. */
  readonly profileOf?: (plan: Plan) => DeviceProfile | undefined;
}

/** Compares two plans. */
export function diffPlans(a: Plan, b: Plan, { hasProgram = true, profileOf = () => undefined }: DiffOptions = {}): PlanDiff {
  const names = ["job", "mesh", "programs", "memory", "kernels", "toolchain"] as const;
  const sections = names.filter((name) => a.digests[name] !== b.digests[name] && !(name === "kernels" && haveSameSources(a, b)));
  const differs = (name: (typeof names)[number]): boolean => sections.includes(name);
  const isSame = sections.length === 0;
  const inspected = (plan: Plan): Inspection => inspectPlan(plan, { profile: profileOf(plan) });
  const [before, after] = isSame ? [] : [inspected(a), inspected(b)];
  const placement = before && after ? placementChanges(before, after) : [];
  return {
    format_version: DIFF_VERSION,
    changes: !isSame || a.format_version !== b.format_version,
    names: [a.job.name, b.job.name],
    digests: [a.digests.plan, b.digests.plan],
    sections,
    job: [
      ...(differs("job") ? fieldChanges(a.job, b.job, "") : []),
      ...(differs("toolchain") ? fieldChanges(a.toolchain, b.toolchain, "toolchain") : []),
    ],
    consequences: before && after ? consequencesOf(before, after, placement) : [],
    placement,
    summary: before && after ? summaryChanges(before, after) : [],
    program: hasProgram && differs("programs") ? programChanges(a.programs, b.programs) : [],
  };
}

/** Returns the differences of some levels. `ignored` are levels, or keys of the job with all below them; `changes` is whether any difference is left. */
export function selectDiff(diff: PlanDiff, only: readonly DiffLevel[], ignored: readonly string[]): PlanDiff {
  if (only.length === 0 && ignored.length === 0) return diff;
  const isSelected = (level: DiffLevel): boolean => (only.length === 0 || only.includes(level)) && !ignored.includes(level);
  const isIgnored = (path: string): boolean => ignored.some((key) => path === key || path.startsWith(`${key}.`));
  const job = isSelected("job") ? diff.job.filter(({ path }) => !isIgnored(path)) : [];
  const [placement, summary, program] = [
    isSelected("placement") ? diff.placement : [],
    isSelected("summary") ? diff.summary : [],
    isSelected("program") ? diff.program : [],
  ];
  const changes = job.length + placement.length + summary.length + program.length > 0;
  return { ...diff, changes, job, placement, summary, program, consequences: isSelected("summary") ? diff.consequences : [] };
}

/** Returns whether kernels differ only in their cubins, which depend on nvcc and not on the job. */
function haveSameSources(a: Plan, b: Plan): boolean {
  const [x, y] = [a, b].map(({ kernels }) => kernels.map(({ cubin: _, ...kernel }) => kernel));
  return isDeepStrictEqual(x, y);
}

function fieldChanges(a: unknown, b: unknown, path: string): FieldChange[] {
  if (isRecord(a) && isRecord(b)) {
    const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])].sort();
    return keys.flatMap((key) => fieldChanges(a[key], b[key], path ? `${path}.${key}` : key));
  }
  if (JSON.stringify(a) === JSON.stringify(b)) return [];
  return [{ path, ...(a === undefined ? {} : { old: a }), ...(b === undefined ? {} : { new: b }) }];
}

const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null && !Array.isArray(value);

type Facts = ReadonlyMap<string, { readonly unit: SummaryChange["unit"]; readonly value: number }>;

function summaryChanges(a: Inspection, b: Inspection): SummaryChange[] {
  const found = new Map<string, SummaryChange & { stages: number[] }>();
  for (let stage = 0; stage < Math.max(a.roles.length, b.roles.length); stage++) {
    const [before, after] = [a, b].map((view) => new Map([...roleFacts(view.roles[stage]), ...timeFacts(view, stage)]));
    if (!before || !after) continue;
    for (const what of new Set([...before.keys(), ...after.keys()])) {
      const [old, now] = [before.get(what), after.get(what)];
      const [from, to] = [old?.value ?? 0, now?.value ?? 0];
      if (from === to) continue;
      const key = `${what}|${from}|${to}`;
      const same = found.get(key);
      if (same) same.stages.push(stage);
      else found.set(key, { stages: [stage], what, unit: (old ?? now)?.unit ?? "count", old: from, new: to });
    }
  }
  return [...found.values()];
}

/** Where the time of a stage goes, and the communication that is hidden. */
function timeFacts({ estimate }: Inspection, stage: number): Facts {
  const own = estimate?.stages.find((s) => s.stage === stage);
  if (!own) return new Map();
  const facts = [
    ...namedParts(own).map(({ name, seconds }) => [`time: ${name}`, seconds] as const),
    ...own.classes
      .filter(({ total, exposed }) => total - exposed > 1e-9 * total)
      .map((c) => [`hidden: ${classText(c)}`, c.total - c.exposed] as const),
  ];
  return new Map(facts.map(([what, value]) => [what, { unit: "seconds" as const, value }]));
}

/** A stage that one plan lacks has zeros there. */
function roleFacts(role: RoleView | undefined): Facts {
  const facts = new Map<string, { unit: SummaryChange["unit"]; value: number }>();
  if (!role) return facts;
  const add = (what: string, unit: SummaryChange["unit"], value: number): void => {
    facts.set(what, { unit, value: (facts.get(what)?.value ?? 0) + value });
  };
  add(
    "layers",
    "count",
    role.chunks.reduce((sum, { layers }) => sum + layers[1] - layers[0], 0),
  );
  add("parameters", "count", role.parameters.elements);
  add("microbatches", "count", role.microbatches);
  add("instructions a step", "count", role.instructions.per_step);
  const { memory } = role;
  for (const kind of [...memoryKinds, "peak"] as const) add(`memory ${kind}`, "bytes", memory[kind]);
  add(
    "copies",
    "count",
    role.chunks.reduce((sum, { copies }) => sum + copies, 0),
  );
  add("flops a step", "flops", role.flops.per_step);
  add("host syncs a step", "count", role.host_syncs_per_step);
  for (const { axes, inside, across, per_step } of trafficOf(role)) {
    add(`traffic ${axes}: collectives and sends a step`, "count", per_step);
    add(`traffic ${axes}: inside a node`, "bytes", Math.round(inside));
    add(`traffic ${axes}: across nodes`, "bytes", Math.round(across));
  }
  return facts;
}

interface Placed {
  readonly stage: number;
  readonly layer: number | undefined;
  readonly does: string;
  readonly kind: Instruction["kind"];
  readonly facts: ReadonlyMap<string, string>;
}

function programChanges(a: readonly Program[], b: readonly Program[]): ProgramChange[] {
  const found = new Map<string, ProgramChange & { layers: number[]; stages: number[] }>();
  const note = (
    change: ProgramChange["change"],
    phase: BlockPhase,
    id: string,
    { stage, layer, does, kind }: Placed,
    differences: ProgramChange["differences"],
  ): void => {
    const name = anyLayer(id, layer);
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
        else {
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
    const buffers = new BufferTable(program.buffers);
    const layers = new Map(
      instructionsOf(program).flatMap((i) => (i.kind === "collective" && i.stream ? [[i.id, layerOf(i, buffers)] as const] : [])),
    );
    for (const instruction of blocksOf(program).flatMap((b) => (b.kind === phase ? b.instructions : []))) {
      const layer = layerOf(instruction, buffers);
      const facts = factsOf(instruction, buffers, layers);
      const one = { stage: program.stage, layer, does: doing(instruction), kind: instruction.kind, facts };
      const before = all.get(instruction.id);
      if (before) before.push(one);
      else all.set(instruction.id, [one]);
    }
  }
  return all;
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

/** Returns the text of an instruction for comparison, without the layers in names. `layers`: those of the collectives that instructions wait for. */
function factsOf(i: Instruction, buffers: BufferTable, layers: ReadonlyMap<string, number | undefined>): Map<string, string> {
  const facts = new Map<string, string>();
  const operand = (name: string, id: string): void => {
    const buffer = buffers.get(id);
    facts.set(`${name} shape`, shapeText(buffer));
    facts.set(`${name} dtype`, buffer.dtype);
    facts.set(`${name} buffer`, anyLayer(id, buffer.layer));
  };
  facts.set("does", doing(i));
  facts.set("waits for", (i.waits ?? []).map((id) => anyLayer(id, layers.get(id))).join(" "));
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
  for (const what of new Set([...a.facts.keys(), ...b.facts.keys()])) {
    const [old, now] = [a.facts.get(what) ?? "none", b.facts.get(what) ?? "none"];
    if (old !== now) changes.push({ what, old, new: now });
  }
  return changes;
}
