/** What a change costs, the gravest first: whether the plan still fits, groups that leave nodes, bytes by link, memory, work. */
import { devices } from "../../schemas/devices.ts";
import { bytesText, countText, flopsText, largest, secondsText, wholeAxes } from "../units.ts";
import type { Inspection } from "./inspect.ts";
import { type AxisTraffic, axisTitle, busiestTraffic } from "./overview.ts";
import { type PlacementChange, placedText } from "./placementChanges.ts";

/** One consequence. */
export interface Consequence {
  readonly kind:
    | "fit"
    | "time"
    | "placement"
    | "traffic"
    | "memory"
    | "flops"
    | "bubble"
    | "host_syncs"
    | "kernels"
    | "instructions"
    | "batch";
  readonly text: string;
  /** For the order: seconds of a step for bytes and flops; more for what decides whether the job runs. */
  readonly weight: number;
  readonly is: "better" | "worse" | "other";
  readonly old?: number;
  readonly new?: number;
}

/** Returns the consequences by falling weight. */
export function consequencesOf(a: Inspection, b: Inspection, placement: readonly PlacementChange[]): Consequence[] {
  const all = [
    ...memoryChange(a, b),
    ...timeChange(a, b),
    ...placement.flatMap((change) => moveConsequence(b, change)),
    ...trafficChanges(a, b),
    ...workChanges(a, b),
  ];
  return all.sort((x, y) => y.weight - x.weight);
}

const peakOf = ({ roles }: Inspection): { readonly stage: number; readonly bytes: number } =>
  roles.reduce((most, { stage, memory }) => (memory.peak > most.bytes ? { stage, bytes: memory.peak } : most), { stage: 0, bytes: 0 });

/** The weight of a plan that fits its device only on one side. */
const DECIDES = 1e9;
/** The weight of the time of a step: it sums up most others. */
const TIMES = 1e8;
/** The weight of groups that enter or leave nodes: above bytes and work, which follow from it. */
const MOVES = 1e6;

function memoryChange(a: Inspection, b: Inspection): Consequence[] {
  const [old, now] = [peakOf(a), peakOf(b)];
  if (old.bytes === now.bytes && a.device.name === b.device.name) return [];
  const [fitted, fits] = [old.bytes <= a.device.memory, now.bytes <= b.device.memory];
  const change = `memory of the fullest rank: ${bytesText(old.bytes)} -> ${bytesText(now.bytes)}${percent(old.bytes, now.bytes)}`;
  const name = b.device.name;
  const text =
    fitted !== fits
      ? `${change}: ${fits ? `fits ${name} now` : `does not fit ${name} any more`} (${bytesText(b.device.memory)})`
      : `${change}, ${((100 * now.bytes) / b.device.memory).toFixed(0)} % of ${name}`;
  const kind = fitted === fits ? "memory" : "fit";
  const weight = fitted === fits ? Math.abs(now.bytes - old.bytes) / Math.max(old.bytes, 1) : DECIDES;
  return [{ kind, text, weight, is: now.bytes > old.bytes ? "worse" : "better", old: old.bytes, new: now.bytes }];
}

/** Seconds of a step, where both plans have an estimate; tokens/s where they have different batches. */
function timeChange({ estimate: old, derived: from }: Inspection, { estimate: now, derived: to }: Inspection): Consequence[] {
  if (!old || !now || old.seconds === now.seconds) return [];
  const sameBatch = from.tokens_per_step === to.tokens_per_step;
  const tokens = (n: number): string => countText(Math.round(n));
  const rates = `${tokens(old.tokens_per_second)} -> ${tokens(now.tokens_per_second)} tokens/s`;
  return [
    {
      kind: "time",
      text: `time of a step: ${secondsText(old.seconds)} -> ${secondsText(now.seconds)}${percent(1e9 * old.seconds, 1e9 * now.seconds)}${sameBatch ? "" : `, ${rates}`}`,
      weight: TIMES,
      is: (sameBatch ? now.seconds > old.seconds : now.tokens_per_second < old.tokens_per_second) ? "worse" : "better",
      old: old.seconds,
      new: now.seconds,
    },
  ];
}

function moveConsequence(b: Inspection, { axis, old, new: now, moved }: PlacementChange): Consequence[] {
  if (moved === "stays" || (old.ranks === 1 && now.ranks === 1)) return [];
  const used = b.roles.some(
    ({ collectives, transfers }) =>
      collectives.some(({ axes }) => wholeAxes(axes).includes(axis)) || (axis === "pp" && transfers.length > 0),
  );
  const does = {
    "leaves the node": "leave the node",
    "enters the node": "stay inside a node now",
    "more nodes": "are on more nodes",
    "fewer nodes": "are on fewer nodes",
  }[moved];
  return [
    {
      kind: "placement",
      text: `${axisTitle(axis)} groups ${does}: ${placedText(old)} -> ${placedText(now)}`,
      weight: MOVES * (axis === "ep" || axis === "etp" ? 3 : axis === "tp" || axis === "cp" ? 4 : 1) * (used ? 1 : 1e-3),
      is: now.nodes > old.nodes ? "worse" : "better",
    },
  ];
}

/** Sums the rows of an axis and of its parts. */
function trafficOf(rows: readonly AxisTraffic[], axis: string): Pick<AxisTraffic, "inside" | "across"> {
  const own = rows.filter(({ axes }) => wholeAxes(axes).join("*") === axis);
  return { inside: own.reduce((sum, row) => sum + row.inside, 0), across: own.reduce((sum, row) => sum + row.across, 0) };
}

/** Bytes of the busiest stage by axes and by link; parts of an axis are counted as the axis. */
function trafficChanges(a: Inspection, b: Inspection): Consequence[] {
  const [old, now] = [busiestTraffic(a).rows, busiestTraffic(b).rows];
  const { links } = devices[b.device.name as keyof typeof devices] ?? { links: null };
  const seconds = (t: Pick<AxisTraffic, "inside" | "across">): number =>
    t.inside / (links?.host ?? 450e9) + t.across / (links?.network ?? 50e9);
  const axes = [...new Set([...old, ...now].map((t) => wholeAxes(t.axes).join("*")))];
  const one = (axis: string): Consequence[] => {
    const [from, to] = [trafficOf(old, axis), trafficOf(now, axis)];
    const delta = seconds(to) - seconds(from);
    if (linkChange(from, to) === "") return [];
    return [
      {
        kind: "traffic",
        text: `${axisTitle(axis)} traffic a step: ${linkChange(from, to)}`,
        weight: Math.abs(delta),
        is: delta > 0 ? "worse" : "better",
      },
    ];
  };
  return axes.flatMap(one);
}

/** `inside a node 96.0 GiB -> 32.0 GiB, across nodes none -> 64.0 GiB`. */
function linkChange(from: Pick<AxisTraffic, "inside" | "across">, to: Pick<AxisTraffic, "inside" | "across">): string {
  const bytes = (n: number): string => (n < 1 ? "none" : bytesText(Math.round(n)));
  const part = (name: string, x: number, y: number): string[] =>
    bytes(x) === bytes(y) ? [] : [`${bytes(x)} -> ${bytes(y)}${percent(x, y)} ${name}`];
  return [...part("across nodes", from.across, to.across), ...part("inside a node", from.inside, to.inside)].join(", ");
}

function workChanges(a: Inspection, b: Inspection): Consequence[] {
  const count = (
    kind: Consequence["kind"],
    old: number,
    now: number,
    weight: number,
    text: (n: number) => string,
    name: string,
  ): Consequence[] =>
    old === now
      ? []
      : [
          {
            kind,
            text: `${name}: ${text(old)} -> ${text(now)}${percent(old, now)}`,
            weight: weight * Math.abs(now - old),
            is: now > old ? "worse" : "better",
            old,
            new: now,
          },
        ];
  const flops = ({ roles }: Inspection): number => largest(roles, (role) => role.flops.per_step);
  const syncs = ({ roles }: Inspection): number => largest(roles, (role) => role.host_syncs_per_step);
  const instructions = ({ roles }: Inspection): number => largest(roles, (role) => role.instructions.per_step);
  const bubble = ({ schedule }: Inspection): number => Math.round(1000 * schedule.bubble) / 10;
  const neutral = (list: Consequence[]): Consequence[] => list.map((c) => ({ ...c, is: "other" as const }));
  return [
    ...count("flops", flops(a), flops(b), 2e-15, flopsText, "flops of the busiest rank a step"),
    ...count("host_syncs", syncs(a), syncs(b), 1, countText, "host syncs a step"),
    ...count("bubble", bubble(a), bubble(b), 0.1, (n) => `${n.toFixed(1)} %`, "bubble of the schedule"),
    ...neutral(count("batch", a.derived.microbatches, b.derived.microbatches, 1e-3, countText, "microbatches a step")),
    ...neutral(count("batch", a.derived.local_experts, b.derived.local_experts, 1e-3, countText, "experts on a rank")),
    ...neutral(count("instructions", instructions(a), instructions(b), 1e-9, countText, "instructions of a rank a step")),
    ...neutral(count("kernels", a.kernels, b.kernels, 1e-6, countText, "kernels")),
  ];
}

/** Returns the relative change in parentheses. */
function percent(from: number, to: number): string {
  if (from < 1 || to < 1) return "";
  const change = (100 * (to - from)) / from;
  return ` (${change > 0 ? "+" : ""}${change.toFixed(Math.abs(change) < 10 ? 1 : 0)} %)`;
}
