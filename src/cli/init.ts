/** `rankc init`: writes a job for a model and a cluster. Asks for what the options leave open if stdin is a terminal. */
import { existsSync } from "node:fs";
import { basename, dirname, join, relative, resolve } from "node:path";
import { type Command, Option } from "commander";
import { type Device, deviceNames } from "../../schemas/devices.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { type ModelName, modelNames } from "../convert/presets/models.ts";
import { schemaPath } from "../convert/schemaPath.ts";
import { readPackageFile } from "../packageFile.ts";
import { atLeastOne, type CommonOptions, type ProcessExit, withExamples, withFormat } from "./options.ts";
import { printJson, printStderr, printStdout } from "./output.ts";
import { expectWritable, writeFolder } from "./outputFiles.ts";

interface InitOptions extends Pick<CommonOptions, "format"> {
  readonly model?: ModelName;
  readonly gpus?: number;
  readonly device?: Device;
  readonly gpusPerNode: number;
  readonly name?: string;
  readonly data: string;
  readonly out: string;
  readonly force?: true;
  readonly list?: true;
}

/** Registers `init`. */
export function registerInit(program: Command, exit: ProcessExit): void {
  withExamples(
    withFormat(program.command("init").description("write a job for a model and a cluster; on a terminal, ask for both"))
      .addOption(new Option("--model <model>", "the model; --list describes them").choices(modelNames))
      .option("--gpus <n>", "the number of GPUs (default: the smallest power of 2 that the model fits)", atLeastOne)
      .addOption(new Option("--device <device>", "the GPU (default: h100-80gb)").choices(deviceNames))
      .option("--gpus-per-node <n>", "GPUs of one host", atLeastOne, 8)
      .option("--name <name>", "the name of the job (default: that of the model)")
      .option("--data <path>", "data.path: a text, or token ids (.bin)", "corpus.txt")
      .option("-o, --out <file>", "the file to write", "job.yaml")
      .option("--force", "replace the file if it exists")
      .option("--list", "list models and devices"),
    "init",
    "init --model mixtral-8x7b --gpus 64 --device h100-80gb -o job.yaml",
    "init --list",
  ).action((options: InitOptions) => runInit(options, exit));
}

async function runInit(options: InitOptions, exit: ProcessExit): Promise<void> {
  if (options.list) return printList(options.format);
  const { out, force, gpusPerNode } = options;
  if (existsSync(out) && !force) throw new Trouble(`${out} exists`, "name another file with -o, or add --force to replace it");
  if (existsSync(dirname(out))) expectWritable(out);
  const asked = await settingsOf(options);
  if (!asked) {
    printStderr("nothing is written");
    return exit.setCode(1);
  }
  const { model, device } = asked;
  const { fewestGpus, presetJob } = await import("../convert/presets/presetJob.ts");
  const gpus = asked.gpus ?? fewestGpus(model, device, gpusPerNode);
  if (gpus === undefined) throw new Trouble(`${model} fits no number of ${device}`, "choose a smaller model or another device");
  const folder = dirname(out);
  const known = schemaFrom(folder);
  const schema = known ?? schemaPath;
  const text = presetJob({ model, gpus, device, gpusPerNode, name: options.name ?? model, data: options.data, schema });
  writeFolder(folder, { [basename(out)]: text, ...(known === undefined && { [schemaPath]: readPackageFile(schemaPath) }) });
  const rest = known === undefined ? `, with ${join(folder, schemaPath)} for editors` : "";
  if (options.format === "json") return printJson({ out, model, gpus, device, schema: join(folder, schema) });
  printStdout(`${out}: ${model} on ${gpus} x ${device}${rest}; go on with rankc check ${out}`);
}

/** Returns model, device and GPUs from the options, or from a person at a terminal; undefined if the person cancels. */
async function settingsOf({ model, device, gpus, gpusPerNode }: InitOptions) {
  if (model !== undefined) return { model, device: device ?? "h100-80gb", gpus } as const;
  if (!process.stdin.isTTY) throw new Trouble("--model is missing", "write --model NAME; rankc init --list describes the models");
  const { askSettings } = await import("./initPrompts.ts");
  return askSettings({ device, gpus, gpusPerNode });
}

/** Returns the path of a schema that the folder, or one above it, has already; undefined if none does. */
function schemaFrom(folder: string): string | undefined {
  for (let at = resolve(folder); ; at = dirname(at)) {
    for (const path of [schemaPath, join("node_modules/rankc", schemaPath)])
      if (existsSync(join(at, path))) return relative(resolve(folder), join(at, path));
    if (at === dirname(at)) return undefined;
  }
}

async function printList(format: InitOptions["format"]): Promise<void> {
  const [{ listModels }, { devices }, { bytesText, millionsText, table }] = await Promise.all([
    import("../convert/presets/presetJob.ts"),
    import("../../schemas/devices.ts"),
    import("../units.ts"),
  ]);
  const models = listModels();
  if (format === "json") return printJson({ models, devices: deviceNames.map((name) => ({ name, memory: devices[name].memory })) });
  const rows = models.map(({ name, label, parameters, active }) => [name, millionsText(parameters), millionsText(active), label]);
  printStdout(
    [
      ...table([["model", "parameters", "of a token", ""], ...rows], [1, 2]),
      "",
      ...table([["device", "memory"], ...deviceNames.map((name) => [name, bytesText(devices[name].memory)])], [1]),
    ].join("\n"),
  );
}
