/** What the page shows, as signals, and the URL fragment that holds it: a copied address opens the same view. */
import { batch, computed, effect, signal } from "@preact/signals";
import type { ViewData } from "../report/view/planView.ts";
import { type AxisName, axisNames, type PlacedView, type PlanModel } from "./planModel.ts";
import { chosenTheme, themeOf } from "./shared/themeChoice.tsx";

/** The panels in the order of the tabs. */
export const panelNames = ["mesh", "schedule", "memory", "program", "traffic", "kernels", "findings"] as const;
/** The name of a panel. */
export type PanelName = (typeof panelNames)[number];

/** What is selected. All panels show it. */
export type Selection =
  | { readonly kind: "rank"; readonly rank: number }
  | { readonly kind: "axis"; readonly axis: AxisName }
  | { readonly kind: "instruction"; readonly stage: number; readonly phase: string; readonly chunk: number; readonly id: string }
  | { readonly kind: "run"; readonly stage: number; readonly run: number }
  | { readonly kind: "tensor"; readonly stage: number; readonly id: string }
  | { readonly kind: "kernel"; readonly id: string }
  | { readonly kind: "pair"; readonly from: number; readonly to: number }
  | { readonly kind: "key"; readonly path: string };

/** The plans of the page. */
export const plans = signal<readonly PlanModel[]>([]);
/** What differs between two plans. */
export const viewDiff = signal<ViewData["diff"]>(undefined);
/** The plan that panels show. */
export const planIndex = signal(0);
/** The open panel. */
export const panel = signal<PanelName>("mesh");
/** What is selected; undefined: nothing. */
export const selection = signal<Selection | undefined>(undefined);
/** The stage that the panels memory and program show. */
export const stage = signal(0);
/** The block that the panel program shows. */
export const block = signal<{ readonly kind: string; readonly chunk: number }>({ kind: "forward", chunk: 0 });
/** The visible time of the step; undefined: all of it. */
export const span = signal<{ readonly from: number; readonly to: number } | undefined>(undefined);
/** The moment whose live tensors the panel memory lists. */
export const moment = signal(0);
/** A sentence about what the pointer or the focus is on; screen readers read it. */
export const status = signal("");
/** Whether the search is open. */
export const isSearching = signal(false);

/** Returns the plan that is shown. */
export const plan = computed((): PlanModel => {
  const shown = plans.value[planIndex.value] ?? plans.value[0];
  if (!shown) throw new Error("rankc: the page has no plan");
  return shown;
});

/** The visible time, and where the step ends. */
export const visible = computed(() => {
  const end = Math.max(...plans.value.map(({ view }) => view.timeline.end), 1e-9);
  return { from: span.value?.from ?? 0, to: span.value?.to ?? end, end };
});

/** Selects something, and opens a panel if one is named. The stage and the block that panels show follow. */
export function select(to: Selection | undefined, open?: PanelName): void {
  batch(() => {
    selection.value = to;
    if (open) panel.value = open;
    if (to?.kind === "instruction") block.value = { kind: to.phase, chunk: to.chunk };
    if (to && "stage" in to) stage.value = to.stage;
    if (to?.kind === "rank") stage.value = plan.value.stageOf(to.rank);
  });
}

/** Selects an instruction. */
export const selectInstruction = ({ stage: of, block: { kind, chunk }, id }: PlacedView, open?: PanelName): void =>
  select({ kind: "instruction", stage: of, phase: kind, chunk, id }, open);

/** The instruction that is selected; undefined if another thing is, or the plan has no such instruction. */
export const selectedInstruction = computed(() => {
  const of = selection.value;
  return of?.kind === "instruction" ? plan.value.find(of.stage, of.phase, of.chunk, of.id) : undefined;
});

/** The rank whose groups the panels show: the selected one, or the first of the stage of the selection. */
export const focusRank = computed((): number => {
  const of = selection.value;
  if (of?.kind === "rank") return of.rank;
  if (of?.kind === "pair") return of.from;
  return plan.value.firstRank(of && "stage" in of ? of.stage : 0);
});

/** The ranks that the selection is about; empty if it is about none. */
export const selectedRanks = computed((): readonly number[] => {
  const of = selection.value;
  const shown = plan.value;
  if (of?.kind === "rank") return [of.rank];
  if (of?.kind === "pair") return [of.from, of.to];
  if (of?.kind === "axis") return shown.group(focusRank.value, of.axis);
  const instruction = selectedInstruction.value;
  if (instruction && instruction.view.kind !== "compute") return shown.ranksOf(instruction, focusRank.value);
  if (of && "stage" in of) {
    const { world } = shown.view.mesh;
    return Array.from({ length: world }, (_, rank) => rank).filter((rank) => shown.stageOf(rank) === of.stage);
  }
  return [];
});

/** Returns the fields of a selection as they stand in the fragment. */
function selectionText(of: Selection): string {
  return Object.values(of).map(String).join("~");
}

/** Reads a selection of the fragment; undefined if it is of no known form. */
function selectionOf(text: string): Selection | undefined {
  const [kind, a = "", b = "", c = "", ...rest] = text.split("~");
  const isCount = (word: string): boolean => /^\d+$/.test(word);
  const axis = axisNames.find((name) => name === a);
  if (kind === "rank" && isCount(a)) return { kind, rank: Number(a) };
  if (kind === "axis" && axis) return { kind, axis };
  if (kind === "instruction" && isCount(a) && isCount(c)) return { kind, stage: Number(a), phase: b, chunk: Number(c), id: rest.join("~") };
  if (kind === "run" && isCount(a) && isCount(b)) return { kind, stage: Number(a), run: Number(b) };
  if (kind === "tensor" && isCount(a)) return { kind, stage: Number(a), id: [b, c, ...rest].filter(Boolean).join("~") };
  if (kind === "kernel") return { kind, id: a };
  if (kind === "pair" && isCount(a) && isCount(b)) return { kind, from: Number(a), to: Number(b) };
  if (kind === "key") return { kind, path: a };
  return undefined;
}

/** The fragment of the view. */
function fragment(): string {
  const of = new URLSearchParams();
  if (planIndex.value > 0) of.set("plan", String(planIndex.value));
  if (stage.value > 0) of.set("stage", String(stage.value));
  if (block.value.kind !== "forward" || block.value.chunk > 0) of.set("block", `${block.value.kind}~${block.value.chunk}`);
  if (span.value) of.set("time", `${round(span.value.from)}~${round(span.value.to)}`);
  if (moment.value > 0) of.set("moment", String(round(moment.value)));
  if (selection.value) of.set("select", selectionText(selection.value));
  if (chosenTheme.value) of.set("theme", chosenTheme.value);
  const rest = of.toString().replaceAll("%7E", "~");
  return `#${panel.value}${rest ? `?${rest}` : ""}`;
}
const round = (n: number): number => Number(n.toPrecision(7));

function readFragment(): void {
  const [name = "", rest = ""] = location.hash.slice(1).split("?", 2);
  const of = new URLSearchParams(rest);
  batch(() => {
    panel.value = panelNames.find((p) => p === name) ?? panel.value;
    planIndex.value = Math.min(Number(of.get("plan") ?? 0) || 0, plans.value.length - 1);
    stage.value = Math.min(Number(of.get("stage") ?? 0) || 0, plan.value.stages - 1);
    const [kind, chunk] = (of.get("block") ?? "forward~0").split("~");
    block.value = { kind: kind ?? "forward", chunk: Number(chunk ?? 0) || 0 };
    const [from, to] = (of.get("time") ?? "").split("~").map(Number);
    span.value = from !== undefined && to !== undefined && to > from ? { from, to } : undefined;
    moment.value = Number(of.get("moment") ?? 0) || 0;
    selection.value = selectionOf(of.get("select") ?? "");
    chosenTheme.value = themeOf(of.get("theme"));
  });
}

/** Reads the fragment, and from then on writes it when the view changes. */
export function followFragment(): void {
  readFragment();
  addEventListener("hashchange", readFragment);
  let waiting: ReturnType<typeof setTimeout> | undefined;
  effect(() => {
    const text = fragment();
    // browsers refuse hundreds of changes of the address in a few seconds
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (text !== location.hash) history.replaceState(null, "", text);
    }, 150);
  });
}
