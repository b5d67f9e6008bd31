import type { Command } from "commander";
import { registerImportCheckpoint } from "./importCheckpoint.ts";
import { registerImportMegatron } from "./importMegatron.ts";
import { registerImportTorchtitan } from "./importTorchtitan.ts";
import { type ProcessExit, withExamples } from "./options.ts";
import { printStdout } from "./output.ts";
import { writeFile } from "./outputFiles.ts";

/** Registers `import`, with a command for each kind of description. */
export function registerImport(program: Command, exit: ProcessExit): void {
  const importing = program.command("import").description("make a job from the description of another tool");
  registerImportHf(importing);
  registerImportMegatron(importing, exit);
  registerImportTorchtitan(importing, exit);
  registerImportCheckpoint(importing);
}

/** Registers `import hf`: writes a job for the model of a Hugging Face config.json. */
function registerImportHf(importing: Command): void {
  withExamples(
    importing
      .command("hf")
      .description("make a job from a Hugging Face config.json (Llama, Mistral, Qwen, Mixtral, OLMoE, DeepSeek)")
      .argument("<config>", "the config.json, or its directory")
      .option("-o, --out <job>", "the file to write (default: stdout)")
      .option("--mtp", "include multi-token prediction (num_nextn_predict_layers), which transformers omits"),
    "import hf config.json -o job.yaml",
    "import hf deepseek-v3/config.json --mtp -o job.yaml",
  ).action(async (path: string, options: { out?: string; mtp?: true }) => {
    const [{ importHfText }, { parseConfig }, { readConfigFile }] = await Promise.all([
      import("../convert/hf/importHf.ts"),
      import("../convert/hf/configReader.ts"),
      import("./inputFiles.ts"),
    ]);
    const { text, file, name } = readConfigFile(path);
    const job = importHfText(parseConfig(text, file), name, { mtp: options.mtp === true });
    if (options.out) writeFile(options.out, job);
    else printStdout(job);
  });
}
