/**
 * Compares estimates with measured steps, as tables for docs/estimate.md: one H200 with rankc's kernels, and published rows with the stacks that ran them.
 * `npm run bench:estimate`, with `-- here` one H200 alone, with `-- two` two of one host, with `-- published` the others, with ids of rows or names of jobs these. Takes about ten
 * minutes of one core.
 *
 * Measured values of one H200 stand in test/fixtures/estimate/h200.tsv alone. `npm run bench:cuda-model -- test/bench/jobs/JOB.yaml --profile-only --steps 5`
 * prints one JSON object for a job; write into its line: forward_backward_ms as blocks_ms, optimizer_ms, device_gib. (Without --profile-only, step_ms of
 * a job whose step_ms is given.) The columns predicted_* were written before the jobs ran; they stay as they are, and errors are given of them and of
 * the estimate of today. The columns again_* are of a later run, with the kernels of today: the estimate of today is compared with it where it is there.
 */
import { readFileSync } from "node:fs";
import { parse, stringify } from "yaml";
import type { DeviceProfile } from "../../schemas/deviceProfile.ts";
import { merged } from "../../src/analysis/estimate/calibrate.ts";
import { estimate } from "../../src/analysis/estimate/estimate.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { largest } from "../../src/units.ts";
import { estimateRow, memoryOfRow, type PublishedRow, readTable } from "./estimateRows.ts";

const named = process.argv.slice(2);
const part = named.find((word) => word === "here" || word === "two" || word === "published");
const only = named.filter((word) => word !== part);
const isAsked = (id: string | undefined): boolean => only.length === 0 || (id !== undefined && only.includes(id));

/** Returns a signed error in percent. */
const error = (estimated: number, measured: number): number => 100 * (estimated / measured - 1);
const signed = (percent: number): string => `${percent > 0 ? "+" : ""}${percent.toFixed(1)} %`;
const print = (cells: readonly string[]): void => console.log(`| ${cells.join(" | ")} |`);
const head = (...cells: string[]): void => {
  console.log("");
  print(cells);
  print(cells.map(() => "---"));
};

/** One microbatch forward and backward, the optimizer step, and memory, beside what an H200 took. */
async function measuredHere(): Promise<void> {
  const profile = packageProfile("h200-141gb")!;
  const target = await loadTarget("cuda:sm_90a");
  const rows = readTable("h200.tsv").filter(({ job }) => isAsked(job));
  head(
    ...["job of test/bench/jobs, one H200", "measured, ms", "predicted, ms", "error", "again, ms", "estimate, ms", "error"],
    ...secondHead,
  );
  const errors: Record<string, number[]> = {};
  const add = (set: string, value: number): void => {
    if (Number.isFinite(value)) (errors[set] ??= []).push(value);
  };
  for (const row of rows) {
    const { job: name = "", step_ms, optimizer_ms, device_gib, use = "" } = row;
    const path = new URL(`jobs/${name}.yaml`, import.meta.url);
    const { job } = readJob(readFileSync(path, "utf8"), `${name}.yaml`);
    if (!job) throw new Error(`${name} is no valid job`);
    const { plan } = compile(job, { target });
    // blocks and optimizers were measured with events around each instruction, whole steps as graphs
    const timed = estimate(plan, { profile, assumed: { timed: true } });
    const optimizer = 1000 * timed.stages[0]!.parts.kernels.optimizer;
    const ms = 1000 * (step_ms === "-" ? timed.seconds : estimate(plan, { profile }).seconds) - (step_ms === "-" ? optimizer : 0);
    const peak = largest(plan.memory, (m) => m.peak) / 2 ** 30;
    const measured = Number(step_ms === "-" ? row.blocks_ms : step_ms);
    const predicted = Number(row.predicted_ms);
    const again = Number(row.again_blocks_ms);
    const latest = Number.isFinite(again) ? again : measured;
    const latestOptimizer = Number.isFinite(again) ? row.again_optimizer_ms : optimizer_ms;
    const [set = ""] = use.split(";");
    if (set === "predicted" || set === "second set") add(`${set}, before they ran`, error(predicted, measured));
    add(`${use.includes("fit: power") ? "on which the law of power is fitted" : "others"}, estimate of today`, error(ms, latest));
    print([
      `${name}${step_ms === "-" ? "" : ", whole step"}`,
      Number.isFinite(measured) ? String(measured) : "not measured",
      ...[known(row.predicted_ms), errorText(predicted, measured), known(row.again_blocks_ms), ms.toFixed(1), errorText(ms, latest)],
      ...[known(latestOptimizer), optimizer.toFixed(1), errorText(optimizer, Number(latestOptimizer))],
      ...[known(device_gib), peak.toFixed(2), errorText(peak, Number(device_gib)), use],
    ]);
  }
  for (const [set, own] of Object.entries(errors)) {
    const worst = own.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a));
    const mean = own.reduce((sum, e) => sum + Math.abs(e), 0) / own.length;
    console.log(`\n${own.length} jobs, ${set}: mean absolute error ${mean.toFixed(1)} %, worst ${signed(worst)}`);
  }
}

const secondHead = ["optimizer, measured", "estimate", "error", "device, GiB", "plan's peak", "error", "from"];
const known = (cell: string | undefined): string => (cell === undefined || cell === "-" ? "" : cell);
const errorText = (estimated: number, measured: number): string =>
  Number.isFinite(estimated) && Number.isFinite(measured) ? signed(error(estimated, measured)) : "";

interface Compared {
  readonly row: PublishedRow;
  readonly time: number;
  readonly memory: number | undefined;
}

/** Returns a profile whose collectives of two ranks are those that were measured on two H200. */
function withMeasuredLinks(profile: DeviceProfile): DeviceProfile {
  const { tables }: Pick<DeviceProfile["links"]["host"], "tables"> = JSON.parse(
    readFileSync(new URL("../fixtures/estimate/links-two-h200.json", import.meta.url), "utf8"),
  );
  const host = profile.links.host;
  return { ...profile, links: { ...profile.links, host: { ...host, tables: merged(host.tables, tables) } } };
}

/**
 * Steps of Mixtral cut to four layers on meshes of two H200: what overlap hides, and what it slows down. Estimates have the profile of the package,
 * the last two columns the links that were measured.
 */
async function twoGpus(): Promise<void> {
  const profile = packageProfile("h200-141gb")!;
  const linked = withMeasuredLinks(profile);
  const target = await loadTarget("cuda:sm_90a");
  const base = parse(readFileSync(new URL("jobs/mixtral-8x7b-4-layers.yaml", import.meta.url), "utf8"));
  head(
    "two H200",
    "measured, ms",
    "estimate, ms",
    "error",
    "over one GPU",
    "communication, measured",
    "estimate",
    "exposed, measured",
    "estimate",
    "from",
    "communication, measured links",
    "over one GPU",
  );
  const errors: number[] = [];
  /** The estimates of one GPU over its measured steps, by its name: those of the machine's kernels. */
  const alone = new Map<string, number>();
  for (const row of readTable("two-gpus.tsv")) {
    const train = {
      ...base.train,
      micro_batch: Number(row.micro),
      global_batch: Number(row.batch),
      optimizer: { type: "adamw", lr: 1e-6 },
      ...parse(row.train ?? ""),
    };
    const text = stringify({ ...base, parallel: parse(row.parallel ?? ""), train });
    const { job, findings } = readJob(text, `${row.mesh}.yaml`);
    if (!job) throw new Error(`${row.mesh}: ${findings.map(({ code }) => code).join()}`);
    const { plan } = compile(job, { target });
    const { seconds, stages } = estimate(plan, { profile });
    const { seconds: linkedSeconds, stages: linkedStages } = estimate(plan, { profile: linked });
    const sum = (key: "total" | "exposed", of = stages): string => {
      const [{ communication }] = [...of].sort((a, b) => a.parts.bubble - b.parts.bubble) as [(typeof stages)[number]];
      return (1000 * communication.reduce((all, own) => all + own[key], 0)).toFixed(1);
    };
    const [measured, ms] = [Number(row.step_ms), 1000 * seconds];
    const [mesh = "", ofOne = ""] = [row.mesh, row.alone];
    if (mesh === ofOne) alone.set(mesh, ms / measured);
    const over = ms / (alone.get(ofOne) ?? Number.NaN);
    if (row.use === "held out" && mesh !== ofOne) errors.push(error(over, measured));
    print([
      ...[mesh, measured.toFixed(1), ms.toFixed(1), errorText(ms, measured), errorText(over, measured)],
      ...[row.communication_ms ?? "", sum("total"), row.exposed_ms ?? "", sum("exposed"), row.use ?? ""],
      ...[sum("total", linkedStages), errorText((1000 * linkedSeconds) / (alone.get(ofOne) ?? Number.NaN), measured)],
    ]);
  }
  const mean = errors.reduce((all, e) => all + Math.abs(e), 0) / errors.length;
  console.log(
    `\nOver one GPU, ${errors.length} held out: mean absolute error ${mean.toFixed(1)} %, worst ${signed(errors.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a)))}`,
  );
}

/** Published rows, one table for each device and stack. */
async function published(): Promise<void> {
  const rows = readTable("rows.tsv").filter(({ id }) => isAsked(id));
  const isExcluded = ({ use }: PublishedRow): boolean => use?.startsWith("excluded") ?? false;
  const all: Compared[] = [];
  for (const stack of [...new Set(rows.map(({ device, stack }) => `${device} ${stack}`))].sort()) {
    const own = rows.filter((row) => `${row.device} ${row.stack}` === stack && !isExcluded(row));
    if (own.length === 0) continue;
    head(`row, ${stack}`, "GPUs, tp pp vpp cp ep", "measured, s", "estimate, s", "error", "memory, GiB", "estimate, GiB", "error", "use");
    for (const row of own) {
      const { seconds } = await estimateRow(row);
      const allocates = memoryOfRow(row) / 2 ** 30;
      const measured = Number(row.seconds);
      const allocated = Number(row.memory_gib);
      const hasMemory = Number.isFinite(allocated);
      all.push({ row, time: error(seconds, measured), memory: hasMemory ? error(allocates, allocated) : undefined });
      print([
        `${row.id} ${row.model}${row.routing === "natural" ? ", natural routing" : ""}`,
        `${row.gpus}, ${row.tp} ${row.pp} ${row.vpp} ${row.cp} ${row.ep}`,
        measured.toPrecision(4),
        seconds.toPrecision(4),
        signed(error(seconds, measured)),
        hasMemory ? allocated.toFixed(1) : "",
        allocates.toFixed(1),
        hasMemory ? signed(error(allocates, allocated)) : "",
        row.use ?? "",
      ]);
    }
  }
  summary(all);
  head("excluded", "why");
  for (const row of rows.filter(isExcluded)) print([`${row.id} ${row.model}`, row.use?.replace("excluded: ", "") ?? ""]);
}

function summary(all: readonly Compared[]): void {
  head("rows", "number", "mean absolute error", "mean", "worst");
  const line = (name: string, errors: readonly number[]): void => {
    if (errors.length === 0) return;
    const mean = (list: readonly number[]): number => list.reduce((a, b) => a + b, 0) / list.length;
    const worst = errors.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a));
    print([name, String(errors.length), `${mean(errors.map(Math.abs)).toFixed(1)} %`, signed(mean(errors)), signed(worst)]);
  };
  for (const stack of new Set(all.map(({ row }) => `${row.device} ${row.stack}`)))
    for (const use of ["fit", "held out"])
      for (const routing of ["even", "natural"]) {
        const own = all.filter(({ row: r }) => `${r.device} ${r.stack}` === stack && r.use === use && r.routing === routing);
        line(
          `time, ${stack}, ${routing} routing, ${use}`,
          own.map(({ time }) => time),
        );
      }
  line(
    "memory, B200",
    all.flatMap(({ row, memory }) => (row.device === "B200" && memory !== undefined ? [memory] : [])),
  );
  line(
    "memory, H100",
    all.flatMap(({ row, memory }) => (row.device === "H100" && memory !== undefined ? [memory] : [])),
  );
}

if (part === undefined || part === "here") await measuredHere();
if (part === undefined || part === "two") await twoGpus();
if (part === undefined || part === "published") await published();
