import type { Command } from "commander";
import { type ImportOutput, printImported } from "./importOutput.ts";
import { atLeastOne, collect, type ProcessExit, withExamples, withFormat } from "./options.ts";

interface Options extends ImportOutput {
  readonly world?: number;
  readonly drop: readonly string[];
  readonly name?: string;
}

/** Registers `import torchtitan`: writes the job of a torchtitan configuration. */
export function registerImportTorchtitan(importing: Command, exit: ProcessExit): void {
  withExamples(
    withFormat(importing.command("torchtitan"))
      .description("make a job from a torchtitan configuration of a mixture-of-experts model (deepseek_v3, qwen3)")
      .argument("<config>", "the configuration, a TOML file")
      .option("-o, --out <job>", "the file to write (default: stdout)")
      .option("--world <ranks>", "the number of ranks", atLeastOne)
      .option("--drop <setting>", "leave out a setting that rankc lacks, for example model.converters (repeatable)", collect, [])
      .option("--name <name>", "the name of the job (default: that of the file)"),
    "import torchtitan deepseek_v3_671b.toml --world 256 -o job.yaml",
  ).action(async (path: string, options: Options) => {
    const [{ importTorchtitan }, { readLaunchFile }] = await Promise.all([
      import("../convert/torchtitan/importTorchtitan.ts"),
      import("./inputFiles.ts"),
    ]);
    const { text, file, name } = readLaunchFile(path);
    const { world, drop } = options;
    const settings = { name: options.name ?? name, drop, ...(world !== undefined && { world }) };
    await printImported(() => importTorchtitan(text, file, settings), options, exit);
  });
}
