import { type Command, InvalidArgumentError } from "commander";
import { deviceNames, deviceOf } from "../../schemas/devices.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { bytesText } from "../units.ts";
import { atLeastOne, type CommonOptions, type ProcessExit, withExamples, withFormat, withSet } from "./options.ts";
import { endProgress, occasionalProgress, printJson, printReport, reportWidth } from "./output.ts";

interface SearchArguments extends CommonOptions {
  readonly gpus?: number;
  readonly device?: string;
  readonly profile?: string;
  readonly fix: readonly string[];
  readonly top: number;
  readonly plans: number;
  /** Bytes. */
  readonly reserve?: number;
}

/** Registers `search`: the fastest mesh for a job; exit 1 if none fits. */
export function registerSearch(program: Command, exit: ProcessExit): void {
  withExamples(
    withSet(withFormat(program.command("search").description("find the fastest mesh for a job that fits its device")))
      .argument("<job>", "the YAML file of a job; its degrees are replaced, or those alone that are auto")
      .option("--gpus <n>", "the number of ranks (default: parallel.world)", atLeastOne)
      .option("--device <name>", "the device (default: cluster.device)")
      .option("--profile <file>", "a device profile, by name or file (default: that of the device)")
      .option(
        "--fix <key=value>",
        "keep a key: tensor, pipeline, virtual_pipeline, context, expert, expert_tensor, micro_batch, recompute, dispatch, expert_overlap, schedule, gradient_bucket, rows_bound; job: as the file has it (repeatable)",
        given,
        [],
      )
      .option("--top <n>", "rows of the table", atLeastOne, 10)
      .option("--plans <n>", "plans to estimate at most", atLeastOne, 20)
      .option(
        "--reserve <GiB>",
        "memory of the device that a plan leaves free (default: 3.5, on one rank 0.75: driver and NCCL)",
        gibibytes,
      ),
    "search job.yaml",
    "search job.yaml --gpus 64 --device h100-80gb",
    "search job.yaml --fix tensor=1 --top 5 --format json",
  ).action(async (path: string, options: SearchArguments) => {
    if (!(await runSearch(path, options))) exit.setCode(1);
  });
}

function gibibytes(text: string): number {
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value) || value < 0) throw new InvalidArgumentError("Write GiB, for example 2.5.");
  return value * 2 ** 30;
}

function given(text: string, all: readonly string[]): string[] {
  if (!/^\w+=\S+$/.test(text)) throw new InvalidArgumentError("Write KEY=VALUE, for example tensor=1.");
  return [...all, text];
}

/** Searches and prints the report. Returns whether a choice fits. */
async function runSearch(path: string, options: SearchArguments): Promise<boolean> {
  const { fixedKeys, loadSearchJob } = await import("./searchJob.ts");
  const { device } = options;
  if (device !== undefined && !deviceNames.some((name) => name === device))
    throw new Trouble(`there is no device ${device}`, `write one of ${deviceNames.join(", ")}`);
  const { job, written, fixed: given } = await loadSearchJob(path, options);
  const { profileFor } = await import("./deviceProfile.ts");
  const profile = await profileFor(job.cluster.device, options.profile);
  if (!profile)
    throw new Trouble(
      `${job.cluster.device} has no device profile, so no step can be estimated`,
      "name a profile with --profile, or another device with --device",
    );
  const [{ search }, { printSearch }, { settingsOf }, { loadDeviceTargets }] = await Promise.all([
    import("../search/search.ts"),
    import("../search/searchText.ts"),
    import("../search/choice.ts"),
    import("../codegen/targets.ts"),
  ]);
  const fixed = { ...given, ...fixedKeys(options.fix, job) };
  const target = (await loadDeviceTargets())(job.cluster.device);
  const print = occasionalProgress();
  const { plans, reserve } = options;
  const { memory } = deviceOf(job.cluster.device);
  if (reserve !== undefined && reserve >= memory)
    throw new Trouble(
      `--reserve leaves nothing of the ${bytesText(memory)} of ${job.cluster.device}`,
      "write the GiB that driver and NCCL need, for example 3.5",
    );
  const onProgress = (line: string): void => print(`search: ${line}`);
  const result = search(job, {
    profile,
    fixed,
    target,
    plans,
    onProgress,
    ...(written && { written }),
    ...(reserve !== undefined && { reserve }),
  });
  endProgress();
  if (options.format === "json") {
    const { best, ...rest } = result;
    const named = best.slice(0, options.top).map((candidate) => ({ ...candidate, set: settingsOf(job, candidate.choice) }));
    printJson({ format_version: "1.0", device: job.cluster.device, ranks: job.parallel.world, best: named, ...rest });
    return best.length > 0;
  }
  printReport(printSearch(job, result, { top: options.top, width: reportWidth(), fixed }).join("\n"));
  return result.best.length > 0;
}
