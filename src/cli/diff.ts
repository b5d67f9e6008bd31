import { type Command, InvalidArgumentError, Option } from "commander";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { type DiffLevel, diffLevels } from "../report/diffLevels.ts";
import { loadBoth } from "./bothSides.ts";
import { forDevice, isPlanPath, type LoadedPlan } from "./loadPlan.ts";
import { asWritten, collect, type JobOptions, type ProcessExit, withExamples, withSet } from "./options.ts";
import { printJson, printReport, printStdout, reportWidth } from "./output.ts";

interface DiffArguments extends JobOptions {
  readonly device?: string;
  readonly setA: readonly string[];
  readonly setB: readonly string[];
  readonly only: readonly DiffLevel[];
  readonly ignore: readonly string[];
  readonly stat?: true;
  readonly format: "text" | "json" | "markdown";
}

/** Registers `diff`: prints the differences of two plans; exits with 1 if they differ. */
export function registerDiff(program: Command, exit: ProcessExit): void {
  const command = program
    .command("diff")
    .description("compare two plans or jobs: consequences, job keys, placement of groups, summary, instructions; exit 1 if they differ");
  withExamples(
    withSet(command)
      .argument("<a>", "a plan, a job, or git:REV:PATH of either")
      .argument("[b]", "the same; without it, --set or -f says how the job <a> changes")
      .option("--set-a <path=value>", "override a key of the first job (repeatable)", collect, [])
      .option("--set-b <path=value>", "override a key of the second job (repeatable)", collect, [])
      .option("--device <profile>", "estimate times by this device profile, by name or file (default: that of cluster.device)")
      .option("--stat", "print one line with the number of differences")
      .option("--only <level>", `print whole levels: ${diffLevels.join(", ")} (repeatable)`, levelOf, [])
      .option("--ignore <level|key>", "ignore a level, or a job key and all below it (repeatable)", collect, [])
      .addOption(new Option("--format <format>", "the output format").choices(["text", "json", "markdown"]).default("text")),
    "diff plan-a/ plan-b/",
    "diff job.yaml --set parallel.expert_tensor=4",
    "diff git:main:plan/ plan/ --format markdown",
    "diff plan/ job.yaml --only placement --ignore train.seed",
  ).action(async (a: string, b: string | undefined, options: DiffArguments) => {
    const [before, after] = await bothPlans(a, b, options);
    const [{ diffPlans, selectDiff }, { printDiff, printStat }, { knownEstimate: estimateOf }] = await Promise.all([
      import("../report/diff.ts"),
      import("../report/diffText.ts"),
      import("./knownEstimate.ts"),
    ]);
    const hasProgram = (options.only.length === 0 || options.only.includes("program")) && !options.ignore.includes("program");
    const { profileFor } = await import("./deviceProfile.ts");
    const profiles = new Map(
      await Promise.all(
        [before, after].map(async ({ plan }) => [plan, await profileFor(plan.job.cluster.device, options.device)] as const),
      ),
    );
    const profileOf = (plan: Plan) => profiles.get(plan);
    const diff = selectDiff(diffPlans(before.plan, after.plan, { hasProgram, profileOf, estimateOf }), options.only, options.ignore);
    if (options.format === "json") printJson(diff);
    else if (options.format === "markdown") printStdout((await import("../report/diffMarkdown.ts")).diffMarkdown(diff));
    else
      printReport(
        options.stat ? printStat(diff, reportWidth()) : printDiff(diff, { width: reportWidth(), isWhole: options.only.length > 0 }),
      );
    if (diff.changes) exit.setCode(1);
  });
}

function levelOf(text: string, all: readonly DiffLevel[]): DiffLevel[] {
  const named = text.split(",").map((name) => {
    const level = diffLevels.find((l) => l === name.trim());
    if (!level) throw new InvalidArgumentError(`The levels are ${diffLevels.join(", ")}.`);
    return level;
  });
  return [...all, ...named];
}

/**
 * Loads both sides; `--set` and `-f` apply to the jobs among them. A job beside a plan is compiled for the target of that plan; two jobs for their
 * devices, as `inspect` shows them.
 */
async function bothPlans(a: string, b: string | undefined, { set, setA, setB, overlay }: DiffArguments): Promise<[LoadedPlan, LoadedPlan]> {
  const targetOf = (beside: LoadedPlan | undefined): string => beside?.plan.toolchain.target ?? forDevice;
  if (b === undefined) {
    if (set.length + setA.length + setB.length + overlay.length === 0)
      throw new Trouble(
        "diff needs a second plan or job",
        "name one, or write --set path=value or -f FILE to compare a job with its changed self",
      );
    const changed = { path: a, set: [...set, ...setB], overlay };
    return loadBoth("diff", [{ path: a, set: setA, overlay: [] }, changed], targetOf);
  }
  const isPlan = { a: isPlanPath(a), b: isPlanPath(b) };
  const common = (is: boolean): JobOptions => (is && !(isPlan.a && isPlan.b) ? asWritten : { set, overlay });
  const side = (path: string, { set, overlay }: JobOptions, own: readonly string[]) => ({ path, set: [...set, ...own], overlay });
  return loadBoth("diff", [side(a, common(isPlan.a), setA), side(b, common(isPlan.b), setB)], targetOf);
}
