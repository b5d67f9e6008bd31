import { type Command, InvalidArgumentError, Option } from "commander";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { Inspection } from "../report/inspect.ts";
import { type Theme, themes } from "../report/svg.ts";
import { loadPlan, loadPlanForDevice } from "./loadPlan.ts";
import { atLeastOne, type CommonOptions, planOrJob, wholeNumber, withExamples, withFormat, withSet } from "./options.ts";
import { printJson, printReport, reportWidth } from "./output.ts";
import { expectWritable, writeFile } from "./outputFiles.ts";
import { warningsOf } from "./warnings.ts";

interface InspectArguments extends CommonOptions {
  readonly time?: true;
  readonly device?: string;
  readonly imbalance?: number;
  readonly mesh?: true;
  readonly memory?: true;
  readonly comms?: true;
  readonly schedule?: true;
  readonly kernels?: true;
  readonly top?: number;
  readonly rank?: number;
  readonly op?: string;
  readonly why?: string;
  readonly job?: string;
  readonly picture?: string;
  readonly theme: Theme;
}

/** A part of a report: its key and value in JSON, and its lines. */
interface Section {
  readonly key: string;
  readonly value: unknown;
  readonly lines: readonly string[];
}

/** Registers `inspect`: one screen about a plan, or the sections that options name. */
export function registerInspect(program: Command): void {
  withExamples(
    withSet(withFormat(program.command("inspect").description("show a plan: one screen about all of it, or the named sections")))
      .argument("<plan|job>", planOrJob)
      .option("--time", "the estimated time of a step: its parts on each stage, communication by axes, and how much of it was measured")
      .option("--device <profile>", "estimate the time by this device profile, by name or file (default: that of cluster.device)")
      .option("--imbalance <factor>", "estimate with so many rows on the busiest expert rank, over the mean (default: 1)", factorOf)
      .option("--mesh", "all nodes and ranks, and the groups of each axis")
      .option("--memory", "the largest tensors of each stage")
      .option("--comms", "collectives and transfers of each stage, by falling bytes; what hides them")
      .option("--schedule", "the order of microbatches on each stage")
      .option("--kernels", "kernels by falling work")
      .option("--top <n>", "rows of --memory, --comms and --kernels (default: 10)", atLeastOne)
      .option("--rank <rank>", "one rank: its coordinates, groups and program", wholeNumber)
      .option("--op <id>", "all about an instruction or a buffer", idText)
      .option("--why <id>", "why an instruction or a buffer exists: job key, decision, bytes, cost, and what removes it", idText)
      .option(
        "--job <file>",
        "the job of the plan, so that --why names its line (default: the file beside it, or in the folder that it was compiled from, that fits)",
      )
      .option("--picture <file>", "draw schedule, memory and traffic as an SVG")
      .addOption(
        new Option("--theme <theme>", "the colours of --picture; auto follows the page that shows it").choices(themes).default("auto"),
      ),
    "inspect plan/",
    "inspect plan/ --memory --top 20",
    "inspect job.yaml --time --device h200-141gb",
    "inspect job.yaml --why layers.0.moe.permute.dispatch",
    "inspect job.yaml --rank 5",
    "inspect job.yaml --picture plan.svg",
  ).action(runInspect);
}

function factorOf(text: string): number {
  const factor = Number(text);
  if (!(factor >= 1)) throw new InvalidArgumentError("Write a number of at least 1.");
  return factor;
}

function idText(text: string): string {
  if (text.trim() === "") throw new InvalidArgumentError("It is empty.");
  return text;
}

async function runInspect(path: string, options: InspectArguments): Promise<void> {
  if (options.picture) expectWritable(options.picture);
  // ids are those of a plan that compile writes; whole reports are about the kernels of the device, which do some instructions at once
  const namesId = options.why !== undefined || options.op !== undefined || options.rank !== undefined;
  const { plan } = await (namesId ? loadPlan : loadPlanForDevice)(path, options);
  const { profileFor } = await import("./deviceProfile.ts");
  const profile = await profileFor(plan.job.cluster.device, options.device);
  if (options.picture) {
    const { drawPlan } = await import("../report/planPicture.ts");
    writeFile(options.picture, drawPlan(plan, options.theme, profile));
  }
  const [{ inspectPlan, INSPECT_VERSION }, { knownEstimate }] = await Promise.all([
    import("../report/inspect.ts"),
    import("./knownEstimate.ts"),
  ]);
  const timed = showsTime(options) ? { profile } : {};
  const view = namesId ? undefined : inspectPlan(plan, { ...timed, imbalance: options.imbalance, estimateOf: knownEstimate });
  const sections = [...(view ? await sectionsOf(plan, view, options) : []), ...(await detailsOf(plan, path, options))];
  if (options.format === "json") {
    const named = Object.fromEntries(sections.map(({ key, value }) => [key, value]));
    const warnings = sections.length === 0 ? { warnings: await warningsOf(plan) } : {};
    return printJson(sections.length === 0 ? { ...view, ...warnings } : { format_version: INSPECT_VERSION, ...named });
  }
  if (sections.length > 0)
    return printReport(
      sections
        .flatMap(({ lines }) => lines)
        .join("\n")
        .trimEnd(),
    );
  if (!view) return;
  const { printOverview } = await import("../report/overview.ts");
  printReport(printOverview(plan, view, await warningsOf(plan), reportWidth()));
}

/** Returns whether the report has the time of a step: on the first screen, with --time, and with --comms. The estimate takes a third of the CPU time of `inspect`. */
const showsTime = ({ time, mesh, memory, comms, schedule, kernels }: InspectArguments): boolean =>
  time === true || comms === true || !(mesh || memory || comms || schedule || kernels);

/** The default number of rows of a table. */
const TOP = 10;

async function sectionsOf(plan: Plan, view: Inspection, options: InspectArguments): Promise<Section[]> {
  const width = reportWidth();
  const { top = TOP } = options;
  const sections: Section[] = [];
  if (options.time) {
    const { printTimeSection } = await import("../report/estimateView.ts");
    sections.push({ key: "estimate", value: view.estimate ?? null, lines: printTimeSection(view.estimate, width) });
  }
  if (options.mesh || options.comms || options.schedule || options.kernels) {
    const { kernelWork, printCommunication, printKernels, printMeshSection, printScheduleSection } = await import("../report/sections.ts");
    const { trafficOf } = await import("../report/overview.ts");
    if (options.mesh) sections.push({ key: "mesh", value: view.mesh, lines: printMeshSection(plan, view, width) });
    if (options.comms) {
      const stages = view.roles.map((role) => {
        const { stage, collectives, transfers } = role;
        const classes = view.estimate?.stages.find((timed) => timed.stage === stage)?.classes;
        return { stage, axes: trafficOf(role), collectives, transfers, ...(classes && { classes }) };
      });
      const { printHidden } = await import("../report/estimateView.ts");
      const lines = [...printCommunication(view, top, width), ...printHidden(view.estimate, width)];
      sections.push({ key: "communication", value: stages, lines });
    }
    if (options.schedule) sections.push({ key: "schedule", value: view.schedule, lines: printScheduleSection(plan, view, width) });
    if (options.kernels) sections.push({ key: "kernels", value: kernelWork(plan).slice(0, top), lines: printKernels(plan, top, width) });
  }
  if (options.memory) {
    const { printTensors, stageTensors } = await import("../report/tensors.ts");
    const value = stageTensors(plan).map(({ stages, tensors }) => ({ stages, tensors: tensors.slice(0, top) }));
    sections.push({ key: "memory", value, lines: printTensors(plan, view, top, width) });
  }
  return sections;
}

/** The sections about one rank, instruction or buffer. */
async function detailsOf(plan: Plan, path: string, options: InspectArguments): Promise<Section[]> {
  const { rank, op, why, job } = options;
  const sections: Section[] = [];
  const width = reportWidth();
  if (rank !== undefined) {
    const { world } = plan.mesh;
    if (rank >= world) throw new Trouble(`there is no rank ${rank}: the plan has ${world}`, `use --rank 0 to --rank ${world - 1}`);
    const { inspectRank, printRank } = await import("../report/inspectRank.ts");
    const view = inspectRank(plan, rank);
    sections.push({ key: "rank", value: view, lines: printRank(plan, view, width) });
  }
  for (const [key, id] of [
    ["op", op],
    ["why", why],
  ] as const) {
    if (id === undefined) continue;
    const [{ findId }, { explainId }, { printWhy }, { keyPlace, refusalsOf }, { printInstructions }] = await Promise.all([
      import("../report/findId.ts"),
      import("../report/why.ts"),
      import("../report/whyText.ts"),
      import("./keyPlace.ts"),
      import("../report/opText.ts"),
    ]);
    const found = findId(plan, id);
    if (key === "op") {
      const instructions = found.instructions.map(({ instruction }) => instruction);
      const value = instructions.length > 0 ? instructions : found.buffers.map(({ buffer }) => buffer);
      sections.push({ key, value, lines: printInstructions(found, width) });
      continue;
    }
    const { profileFor } = await import("./deviceProfile.ts");
    const answer = explainId(plan, found, await profileFor(plan.job.cluster.device, options.device));
    const place = await keyPlace(plan, answer.key.path, { path, job, options });
    const refusals = await refusalsOf(plan.job, answer.removed_by);
    sections.push({ key, value: { ...answer, place }, lines: printWhy(answer, place, refusals, width) });
  }
  return sections;
}
