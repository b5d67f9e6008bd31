import type { Command } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import { loadPlan } from "./loadPlan.ts";
import { type CommonOptions, planOrJob, wholeNumber, withExamples, withFormat, withSet } from "./options.ts";
import { printJson, printStdout } from "./output.ts";
import { expectWritable, writeFile } from "./outputFiles.ts";

/** Registers `inspect`: prints mesh, memory and collectives of a plan, or the program of one rank. */
export function registerInspect(program: Command): void {
  withExamples(
    withSet(
      withFormat(program.command("inspect").description("show the mesh, the memory and the collectives of a plan, with their origins")),
    )
      .argument("<plan|job>", planOrJob)
      .option("--rank <rank>", "show one rank: its coordinates, groups and program", wholeNumber)
      .option("--picture <file>", "draw the schedule and the memory of each stage as an SVG"),
    "inspect plan/",
    "inspect job.yaml --rank 5",
    "inspect job.yaml --picture plan.svg",
  ).action(async (path: string, options: CommonOptions & { rank?: number; picture?: string }) => {
    if (options.picture) expectWritable(options.picture);
    const { plan } = await loadPlan(path, options.set);
    if (options.picture) {
      const { drawPlan } = await import("../report/planPicture.ts");
      writeFile(options.picture, drawPlan(plan));
    }
    const json = options.format === "json";
    if (options.rank === undefined) {
      const [{ inspectPlan }, { printInspect }] = await Promise.all([import("../report/inspect.ts"), import("../report/inspectText.ts")]);
      const view = inspectPlan(plan);
      return json ? printJson(view) : printStdout(printInspect(view));
    }
    const { world } = plan.mesh;
    if (options.rank >= world)
      throw new Trouble(`there is no rank ${options.rank}: the plan has ${world}`, `use --rank 0 to --rank ${world - 1}`);
    const { inspectRank, printRank } = await import("../report/inspectRank.ts");
    const view = inspectRank(plan, options.rank);
    return json ? printJson(view) : printStdout(printRank(view));
  });
}
