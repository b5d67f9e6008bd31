/** Compares two plans on four levels: job keys, placement of groups, the summary of each stage, instructions. */
import { isDeepStrictEqual } from "node:util";
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import type { Plan } from "../../schemas/plan.ts";
import { memoryKinds } from "../analysis/memoryBreakdown.ts";
import { type Consequence, consequencesOf } from "./consequences.ts";
import type { DiffLevel } from "./diffLevels.ts";
import { classText, namedParts } from "./estimateView.ts";
import { type Inspection, type InspectOptions, inspectPlan, type RoleView } from "./inspect.ts";
import { trafficOf } from "./overview.ts";
import { type PlacementChange, placementChanges } from "./placementChanges.ts";
import { type ProgramChange, programChanges } from "./programChanges.ts";

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
  readonly estimateOf?: InspectOptions["estimateOf"];
}

/** Compares two plans. */
export function diffPlans(a: Plan, b: Plan, { hasProgram = true, profileOf = () => undefined, estimateOf }: DiffOptions = {}): PlanDiff {
  const names = ["job", "mesh", "programs", "memory", "kernels", "toolchain"] as const;
  const sections = names.filter((name) => a.digests[name] !== b.digests[name] && !(name === "kernels" && haveSameSources(a, b)));
  const differs = (name: (typeof names)[number]): boolean => sections.includes(name);
  const isSame = sections.length === 0;
  const inspected = (plan: Plan): Inspection => inspectPlan(plan, { profile: profileOf(plan), ...(estimateOf && { estimateOf }) });
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
  add("pairs of forward and backward", "count", role.pairs);
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
