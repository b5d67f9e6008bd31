import type { Command } from "commander";
import type { PlanToView } from "../report/view/readPlanView.ts";
import { loadBoth } from "./bothSides.ts";
import type { Searched } from "./keyPlace.ts";
import { type LoadedPlan, loadPlan } from "./loadPlan.ts";
import { asWritten, type JobOptions, withExamples, withSet, withTarget } from "./options.ts";
import { printStderr } from "./output.ts";
import { expectWritable, writeFile } from "./outputFiles.ts";

interface ViewOptions extends JobOptions {
  readonly target?: string;
  readonly job?: string;
  readonly device?: string;
  readonly output: string;
}

/** Registers `view`: writes a page that shows a plan, or two and what differs. */
export function registerView(program: Command): void {
  withExamples(
    withTarget(
      withSet(program.command("view").description("write a page that shows a plan, or two plans and what differs, in any browser")),
    )
      .argument("<plan|job>", "a plan (its directory or plan.json), or a job")
      .argument("[other]", "a second plan or job; --set and -f change this one, or the first if there is no second")
      .option(
        "--job <file>",
        "the job of the first plan, so that the page shows its lines (default: the file beside it, or in the folder that it was compiled from, that fits)",
      )
      .option("--device <profile>", "estimate seconds by this device profile, by name or file (default: that of cluster.device)")
      .option("-o, --output <file>", "the page: one HTML file that needs no network", "plan.html"),
    "view plan/",
    "view job.yaml --target cuda:sm_90a -o job.html",
    "view plan-a/ plan-b/ -o changes.html",
    "view job.yaml job.yaml --set parallel.expert_tensor=4",
  ).action(async (first: string, second: string | undefined, options: ViewOptions) => {
    expectWritable(options.output);
    const { pageTemplate, pageOf } = await import("./viewPage.ts");
    const template = pageTemplate();
    const [a, b] = await loaded(first, second, options);
    const { viewData } = await import("../report/view/readPlanView.ts");
    const own = await shown(a, { path: first, job: options.job, options: second === undefined ? options : asWritten }, options.device);
    const other = b && second !== undefined ? [await shown(b, { path: second, options }, options.device)] : [];
    const plans = b ? [a, b] : [a];
    writeFile(options.output, pageOf(template, viewData([own, ...other]), plans.map(sourcesOf)));
    printStderr(`${options.output}: open it in a browser`);
  });
}

/** Loads one plan or both. A job is compiled for the target that is asked for. */
async function loaded(first: string, second: string | undefined, options: ViewOptions): Promise<[LoadedPlan, LoadedPlan?]> {
  const { target, set, overlay } = options;
  if (second === undefined) return [await loadPlan(first, options, target)];
  return loadBoth(
    "view",
    [
      { path: first, ...asWritten },
      { path: second, set, overlay },
    ],
    () => target,
  );
}

/** Adds to a plan what the page shows beside it. */
async function shown({ plan }: LoadedPlan, searched: Searched, device: string | undefined): Promise<PlanToView> {
  const [{ jobView }, { warningsOf }, { decidingKeys }, { profileFor }] = await Promise.all([
    import("./jobView.ts"),
    import("./warnings.ts"),
    import("../report/view/readPlanView.ts"),
    import("./deviceProfile.ts"),
  ]);
  const profile = await profileFor(plan.job.cluster.device, device);
  return { plan, profile, job: await jobView(plan, decidingKeys(plan), searched), warnings: await warningsOf(plan) };
}

/** Returns the sources of the kernels by file name. */
function sourcesOf({ plan, source }: LoadedPlan): Readonly<Record<string, string>> {
  const files = new Set(plan.kernels.flatMap((kernel) => (kernel.source ? [kernel.source.file] : [])));
  return Object.fromEntries([...files].map((file) => [file, source(file)]));
}
