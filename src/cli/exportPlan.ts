import { dirname, join } from "node:path";
import { type Command, InvalidArgumentError } from "commander";
import type { Plan } from "../../schemas/plan.ts";
import { stageOfRank } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { bytesText, countText, plural } from "../units.ts";
import { type JobOptions, planOrJob, wholeNumber, withExamples, withSet } from "./options.ts";
import { printStderr, printStdout } from "./output.ts";
import { expectWritable, expectWritableFolder, freeBytes, writeStreams } from "./outputFiles.ts";

interface PlanExportOptions extends JobOptions {
  readonly out: string;
  readonly stage?: number;
  readonly ranks?: string;
  readonly estimate?: true;
  readonly device?: string;
}

/** The content of one file, in pieces. */
type Pieces = Iterable<string | Uint8Array>;

/** A format: what its files hold. `folder`: --out names a folder with a file for each rank. */
interface PlanFormat {
  readonly name: string;
  readonly description: string;
  readonly chooses: boolean;
  readonly folder?: true;
  /** Whether `--estimate` gives it seconds. */
  readonly estimates?: true;
  readonly examples: readonly string[];
  files(
    plan: Plan,
    ranks: readonly number[],
    out: string,
    options: Pick<PlanExportOptions, "estimate" | "device">,
  ): Promise<Iterable<readonly [path: string, content: Pieces]>>;
}

const stagesOf = ({ mesh }: Plan, ranks: readonly number[]): number[] =>
  [...new Set(ranks.map((rank) => stageOfRank(mesh, rank)))].sort((a, b) => a - b);

const formats: readonly PlanFormat[] = [
  {
    name: "trace",
    description: "write the schedule as a trace for Perfetto: a process for each rank, in units of a forward block",
    chooses: true,
    estimates: true,
    examples: [
      "export trace plan/ -o plan.trace.json",
      "export trace plan/ -o plan.trace.json --ranks 0-7",
      "export trace job.yaml -o estimate.trace.json --estimate --stage 0",
    ],
    async files(plan, ranks, out, { estimate, device }) {
      if (estimate) {
        const [{ estimateTrace }, { profileFor }] = await Promise.all([
          import("../convert/plan/estimateTrace.ts"),
          import("./deviceProfile.ts"),
        ]);
        const profile = await profileFor(plan.job.cluster.device, device);
        if (!profile)
          throw new Trouble(
            `${plan.job.cluster.device} has no device profile, so no step can be estimated`,
            "name a profile with --device",
          );
        let bytes = 0;
        const pieces = estimateTrace(plan, ranks, profile, (written) => {
          // ranks have about the same size, so the first one says what all of them need
          if (written === 1) expectRoom(dirname(out), bytes, ranks.length);
        });
        return [[out, counted(pieces, (more) => (bytes += more))]];
      }
      if (device !== undefined) throw new Trouble("--device is given without --estimate", "add --estimate");
      const { scheduleTimes, scheduleTrace } = await import("../convert/plan/scheduleTrace.ts");
      return [[out, scheduleTrace(plan, ranks, scheduleTimes(plan))]];
    },
  },
  {
    name: "pipeline-csv",
    description: "write the schedule as the CSV that torch.distributed.pipelining loads (_load_csv, compute_only)",
    chooses: false,
    examples: ["export pipeline-csv plan/ -o schedule.csv"],
    async files(plan, _, out) {
      const { pipelineCsv } = await import("../convert/plan/pipelineCsv.ts");
      return [[out, [pipelineCsv(plan)]]];
    },
  },
  {
    name: "chakra",
    description: "write execution traces of MLCommons Chakra: a file for each rank, and the communicators",
    chooses: true,
    folder: true,
    examples: ["export chakra plan/ -o traces/", "export chakra plan/ -o traces/ --ranks all"],
    files: async (plan, ranks, out) => chakraFiles(plan, ranks, out),
  },
  {
    name: "graphviz",
    description: "write stages, transfers and collectives as a graph for Graphviz",
    chooses: true,
    examples: ["export graphviz plan/ -o plan.dot"],
    async files(plan, ranks, out) {
      const { graphvizText, overviewGraph } = await import("../convert/plan/overviewGraph.ts");
      return [[out, [graphvizText(overviewGraph(plan, stagesOf(plan, ranks)))]]];
    },
  },
  {
    name: "mermaid",
    description: "write stages, transfers and collectives as a flowchart for Mermaid",
    chooses: true,
    examples: ["export mermaid plan/ -o plan.mmd", "export mermaid plan/ -o plan.mmd --stage 0"],
    async files(plan, ranks, out) {
      const { fitsMermaid, mermaidText, overviewGraph } = await import("../convert/plan/overviewGraph.ts");
      const text = mermaidText(overviewGraph(plan, stagesOf(plan, ranks)));
      if (!fitsMermaid(text))
        throw new Trouble("the flowchart is larger than Mermaid draws by default", "choose a stage with --stage, or export graphviz");
      return [[out, [text]]];
    },
  },
];

async function chakraFiles(plan: Plan, ranks: readonly number[], out: string): Promise<Iterable<readonly [string, Pieces]>> {
  const [{ chakraTrace }, { RankGroups }] = await Promise.all([
    import("../convert/plan/chakra.ts"),
    import("../convert/plan/rankGroups.ts"),
  ]);
  const communicators = new RankGroups(plan.mesh);
  function* files(): Generator<readonly [string, Pieces]> {
    let written = 0;
    for (const [done, rank] of ranks.entries()) {
      // traces of a plan have about the same size, so the first one says what all of them need
      if (done === 1) expectRoom(out, written, ranks.length);
      yield [join(out, `plan.${rank}.et`), counted(chakraTrace(plan, rank, communicators), (bytes) => (written += bytes))];
    }
    // complete once all ranks are written
    const groups = Object.fromEntries(communicators.all.map(({ name, ranks: members }) => [name, members]));
    yield [join(out, "comm_groups.json"), [`${JSON.stringify(groups)}\n`]];
  }
  return files();
}

/** Yields pieces, and reports their bytes. */
function* counted<Piece extends string | Uint8Array>(pieces: Iterable<Piece>, report: (bytes: number) => void): Generator<Piece> {
  for (const piece of pieces) {
    report(piece.length);
    yield piece;
  }
}

/** Throws a Trouble if files of these bytes do not fit the disk of a folder. Prints their size if it is large. */
export function expectRoom(folder: string, bytes: number, files: number): void {
  const [needed, free] = [bytes * (files - 1), freeBytes(folder)];
  const text = `the trace of a rank has ${bytesText(bytes)}: ${countText(files)} ranks take about ${bytesText(bytes * files)}`;
  if (needed > free)
    throw new Trouble(`${text}, and ${folder} has room for ${bytesText(free)}`, "name fewer ranks: --ranks 0-7, or --stage 0");
  if (needed > LARGE) printStderr(text);
}
/** Bytes of traces whose size is printed. */
const LARGE = 2 ** 30;

/** Registers the exports of plans below `export`: formats of other tools. */
export function registerExportPlan(program: Command): void {
  for (const format of formats) {
    const command = withSet(program.command(format.name))
      .description(format.description)
      .argument("<plan|job>", planOrJob)
      .requiredOption(format.folder ? "-o, --out <dir>" : "-o, --out <file>", format.folder ? "the folder to write" : "the file to write");
    if (format.chooses)
      command
        .option("--stage <stage>", "one rank of this stage (default: one rank of each stage)", wholeNumber)
        .option("--ranks <list>", "these ranks, such as 0-7,64, or all", listText);
    if (format.estimates)
      command
        .option("--estimate", "each instruction in seconds by the estimate, with the tracks of run --profile, in place of the schedule")
        .option("--device <profile>", "with --estimate: the device profile, by name or file (default: that of cluster.device)");
    withExamples(command, ...format.examples).action((path: string, options: PlanExportOptions) => exportPlan(format, path, options));
  }
}

function listText(text: string): string {
  if (text.trim() === "") throw new InvalidArgumentError("It is empty.");
  return text;
}

async function exportPlan(
  format: PlanFormat,
  path: string,
  { out, stage, ranks: list, estimate, device, ...job }: PlanExportOptions,
): Promise<void> {
  if (format.folder) expectWritableFolder(out);
  else expectWritable(out);
  const [{ loadPlan, loadPlanForDevice }, { chosenRanks }] = await Promise.all([
    import("./loadPlan.ts"),
    import("../convert/plan/ranks.ts"),
  ]);
  const { plan } = await (estimate ? loadPlanForDevice : loadPlan)(path, job);
  const ranks = chosenRanks(plan.mesh, { stage, ranks: list });
  writeStreams(await format.files(plan, ranks, out, { ...(estimate && { estimate }), ...(device !== undefined && { device }) }), out);
  printStdout(
    `${out}: ${format.chooses ? `${plural(ranks.length, "rank")} of ${plan.mesh.world}` : plural(plan.programs.length, "stage")}`,
  );
}
