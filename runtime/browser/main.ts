/** The page: loads a plan and a text, trains the model on the browser's GPU, and draws the loss. Errors are shown on the page. */
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { batchesOf, readingOf } from "../train/inputs.ts";
import { type Run, runOn, type StepResult } from "../train/loop.ts";
import { webgpuOn } from "../webgpu/backend.ts";
import { chartIn } from "./chart.ts";
import { figures, showParts } from "./head.tsx";
import { browser } from "./host.ts";
import { type Loaded, loadCorpus, loadPlan, readText } from "./loaded.ts";

function at<T extends HTMLElement>(id: string, kind: new () => T): T {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`rankc: the page has no ${id}`);
  return found;
}
const [start, stop] = [at("start", HTMLButtonElement), at("stop", HTMLButtonElement)];
const [text, file, steps] = [at("text", HTMLSelectElement), at("file", HTMLInputElement), at("steps", HTMLInputElement)];
const [rows, wrong] = [at("rows", HTMLTableSectionElement), at("error", HTMLElement)];
const setText = (id: string, what: string): void => {
  at(id, HTMLElement).textContent = what;
};
showParts(at("theme", HTMLElement), at("facts", HTMLElement));
const chart = chartIn(at("chart", HTMLElement), "chart-title");

/** Whether a run is in progress; Stop clears it, and the run ends after its step. */
let running = false;

function describe({ job, mesh, programs, memory, toolchain }: Plan): void {
  document.title = `${job.name} · rankc`;
  setText("name", job.name);
  const { layers, hidden, seq, moe } = job.model;
  const parameters = programs.reduce((sum, p) => sum + countOf(p), 0);
  const ranks = mesh.world === 1 ? "1 rank" : `${mesh.world} ranks on one GPU`;
  const experts = moe ? `, ${moe.experts} experts` : "";
  setText(
    "about",
    `${layers} layers, hidden ${hidden}${experts}, ${compact(parameters)} parameters; ${job.train.global_batch} × ${seq} tokens a step; ${ranks}, ${toolchain.target}`,
  );
  figures.memory.value = mebibytes(memory.reduce((sum, m) => sum + m.peak * mesh.per_stage, 0));
  steps.value = String(job.train.steps);
  text.options[0]!.textContent = `the plan's corpus (${job.data.path.split("/").at(-1)})`;
}
const countOf = ({ parameters, buffers }: Plan["programs"][number]): number =>
  parameters
    .filter((p) => !p.tied_to)
    .reduce((sum, p) => sum + buffers.find((b) => b.id === p.buffer)!.sizes.reduce((n, size) => n * size, 1), 0);
const compact = (n: number): string => new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(n);
const mebibytes = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(bytes < 2 ** 27 ? 1 : 0)} MiB`;

async function train({ plan, kernel }: Loaded): Promise<void> {
  const count = steps.valueAsNumber;
  clear(count);
  setText("status", "Reading the text…");
  const chosen = text.value === "file" ? { ids: await readText(file.files![0]!) } : await loadCorpus(plan);
  const batch = batchesOf(chosen, readingOf(plan.job));
  setText("status", `Compiling ${plan.kernels.length} kernels…`);
  const localRanks = await webgpuOn(browser, plan, { kernel });
  figures.adapter.value = localRanks.adapter;
  let run: Run;
  try {
    run = runOn(plan, { localRanks, batch });
  } catch (error) {
    await localRanks.close();
    throw error;
  }
  try {
    let done = 0;
    while (running && done < count) {
      setText("status", `Training: step ${done + 1} of ${count}`);
      show(await run.step());
      done++;
    }
    setText("status", done < count ? `Stopped after ${done} of ${count} steps; Start begins a new run.` : `Trained ${counted(count)}.`);
  } finally {
    await run.close();
  }
}
const counted = (n: number): string => `${n} step${n === 1 ? "" : "s"}`;

function clear(count: number): void {
  wrong.hidden = true;
  rows.replaceChildren();
  recent.length = 0;
  for (const id of ["step", "loss", "speed"] as const) figures[id].value = "–";
  chart.clear(count);
}

/** The last steps, whose mean is the displayed speed. */
const recent: StepResult[] = [];
const WINDOW = 10;

function show(result: StepResult): void {
  recent.push(result);
  if (recent.length > WINDOW) recent.shift();
  const speed = recent.reduce((sum, r) => sum + r.tokens, 0) / recent.reduce((sum, r) => sum + r.seconds, 0);
  figures.step.value = String(result.step);
  figures.loss.value = result.loss.toFixed(4);
  figures.speed.value = Math.round(speed).toLocaleString("en");
  chart.add(result.loss);
  const row = rows.insertRow();
  const { step, loss, grad_norm, lr, tokens, seconds } = result;
  for (const cell of [String(step), loss.toFixed(6), grad_norm.toFixed(4), lr.toExponential(2), (tokens / seconds).toFixed(0)])
    row.insertCell().textContent = cell;
}

function showError(error: unknown): void {
  const [what, fix] = error instanceof Trouble ? [error.message, error.fix] : [error instanceof Error ? error.message : String(error)];
  const head = document.createElement("strong");
  head.textContent = "Error: ";
  wrong.replaceChildren(head, what, fix ? `\nFix: ${fix}.` : "");
  wrong.hidden = false;
  setText("status", "");
}

/** Enables the controls of a state. */
function enable(state: "idle" | "running"): void {
  const isRunning = state === "running";
  for (const control of [start, text, file, steps]) control.disabled = isRunning;
  stop.disabled = !isRunning;
  start.disabled ||= text.value === "file" && !file.files?.length;
}

async function open(): Promise<void> {
  const loaded = await loadPlan();
  describe(loaded.plan);
  at("controls", HTMLFormElement).addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    running = true;
    enable("running");
    train(loaded)
      .catch(showError)
      .finally(() => {
        running = false;
        enable("idle");
      });
  });
  stop.addEventListener("click", () => {
    running = false;
    stop.disabled = true;
  });
  text.addEventListener("change", () => {
    at("file-label", HTMLElement).hidden = text.value !== "file";
    enable("idle");
  });
  file.addEventListener("change", () => enable("idle"));
  enable("idle");
  // report missing WebGPU now instead of at the first start
  await browser.gpu({ enable: [], disable: [] });
}

open().catch(showError);
