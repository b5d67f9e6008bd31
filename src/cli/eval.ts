/** `rankc eval`: the loss and the perplexity of a trained model on held-out data. */
import { type Command, Option } from "commander";
import { type BackendName, backendNames, backends } from "../../runtime/backends.ts";
import type { EvaluationResult } from "../../runtime/train/loop.ts";
import { type HeldOutPart, heldOutParts } from "../../schemas/heldOut.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { version } from "../version.ts";
import { launchRanks } from "./launchRanks.ts";
import { dataDirOf, type LoadedPlan, loadPlan, planFile } from "./loadPlan.ts";
import {
  type CommonOptions,
  collect,
  dataDirHelp,
  type ProcessExit,
  planOrJob,
  withExamples,
  withFormat,
  withSet,
  withTarget,
} from "./options.ts";
import { printJson, printStderr, printStdout } from "./output.ts";

interface EvalOptions extends CommonOptions {
  readonly backend: BackendName;
  readonly resume?: string;
  readonly initFrom?: string;
  readonly allowMismatch: readonly string[];
  readonly on?: HeldOutPart;
  readonly target?: string;
  readonly dataDir?: string;
}

/** Registers `eval`. */
export function registerEval(program: Command, exit: ProcessExit): void {
  withExamples(
    withTarget(withSet(withFormat(program.command("eval").description("loss and perplexity of a checkpoint on validation and test data"))))
      .argument("<plan|job>", `${planOrJob}; its job has train.evaluation`)
      .addOption(new Option("--backend <backend>", "the backend, as in rankc run").choices(backendNames).default(backendNames[0]))
      .option("--resume <dir>", "the checkpoint, or a folder of checkpoints (the newest is used)")
      .option("--init-from <file>", "the weights of a safetensors file")
      .option("--allow-mismatch <key>", "accept that the checkpoint differs from the job in this key (repeatable)", collect, [])
      .addOption(new Option("--on <part>", "evaluate on one of them (default: on all that the job has)").choices(heldOutParts))
      .option("--data-dir <dir>", dataDirHelp),
    "eval plan/ --resume checkpoints/",
    "eval job.yaml --init-from model.safetensors --on test --set train.evaluation.steps=all",
  ).action(async (path: string, options: EvalOptions) => {
    const loaded = await loadPlan(path, options, options.target ?? (planFile(path) ? undefined : targetOf(options.backend)));
    exit.setCode(
      (await launchRanks(loaded.plan, options.backend)) ?? (await evaluatePlan(loaded, options.dataDir ?? dataDirOf(path), options)),
    );
  });
}

/** Returns the default target of a backend. Throws a Trouble if it depends on the device. */
export function targetOf(backend: BackendName): string {
  const { target } = backends[backend];
  if (target.name === null) throw new Trouble(target.found, target.fix);
  return target.name;
}

async function evaluatePlan({ plan, source, cubin }: LoadedPlan, baseDir: string, options: EvalOptions): Promise<number> {
  const { backend, resume, initFrom, allowMismatch, on, format } = options;
  if (plan.job.train.evaluation === null)
    throw new Trouble(
      "the plan has no evaluation",
      "add train.evaluation to the job and compile it again, for example --set train.evaluation.steps=all",
    );
  if (resume === undefined && initFrom === undefined)
    throw new Trouble(
      "neither --resume nor --init-from names the weights to evaluate",
      "add --resume DIR, a checkpoint or a folder of checkpoints",
    );
  const [{ openRun }, { evaluationText }] = await Promise.all([import("../../runtime/train/openRun.ts"), import("./progress.ts")]);
  const run = await openRun(plan, {
    ...{ backend, source, baseDir, version, allowMismatch },
    ...(cubin && { cubin }),
    ...(resume !== undefined && { resume }),
    ...(initFrom !== undefined && { initFrom }),
  });
  const results: EvaluationResult[] = [];
  try {
    if (run.leads) for (const note of run.notes) printStderr(`note: ${note}`);
    const parts = on === undefined ? run.heldOut : run.heldOut.filter((part) => part === on);
    if (parts.length === 0)
      throw new Trouble(`the job has no ${on} data`, `give it a share in data.split, or name data sets in data.${on}`);
    for (const part of parts) {
      const result = await run.evaluate(part);
      results.push(result);
      if (run.leads && format === "text") printStdout(evaluationText(result));
    }
    if (run.leads && format === "json") printJson(Object.fromEntries(results.map(({ part, ...result }) => [part, result])));
    await run.close();
  } catch (error) {
    await run.close(error as Error).catch(() => {});
    throw error;
  }
  return 0;
}
