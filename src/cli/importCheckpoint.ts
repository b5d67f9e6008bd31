import { type Command, Option } from "commander";
import type { NamedWeights } from "../../runtime/checkpoint/hfExport.ts";
import type { Distcp } from "../../runtime/checkpoint/megatron/distcp.ts";
import type { Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { plural } from "../units.ts";
import { configFor, dtypeNames, jsonText, type ModelOptions, progressOf, withModelOptions } from "./hfModel.ts";
import { atLeastOne, withExamples } from "./options.ts";
import { printStdout } from "./output.ts";
import { expectWritable } from "./outputFiles.ts";

interface Options extends ModelOptions {
  readonly out: string;
  readonly config?: string;
  readonly vocab?: number;
}

/** Registers `import checkpoint`: converts a distributed checkpoint of Megatron Core to Hugging Face's form. */
export function registerImportCheckpoint(importing: Command): void {
  withExamples(
    withModelOptions(
      importing
        .command("checkpoint")
        .description(
          "convert the weights of a Megatron Core checkpoint (torch_dist) of a GPT model, dense or with experts, to a folder for --init-from and from_pretrained",
        )
        .argument("<dir>", "the folder of a checkpoint (iter_0001000), or the folder that Megatron saved to (the newest is used)")
        .requiredOption(
          "-o, --out <dir>",
          "the folder to write; a name that ends in .safetensors: one file in fp32 without a config, of any model",
        )
        .addOption(new Option("--config <file>", "the config.json of the model (default: from the arguments in the checkpoint)"))
        .option("--vocab <tokens>", "the size of the tokenizer: rows of the embedding beyond it are left out (default: all)", atLeastOne),
    ),
    "import checkpoint checkpoints/iter_0001000 -o model/",
    "import checkpoint checkpoints/ --vocab 151936 -o model/",
    "import checkpoint checkpoints/ --config Qwen3-30B-A3B/config.json -o model/",
  ).action(importCheckpoint);
}

async function importCheckpoint(dir: string, options: Options): Promise<void> {
  const [{ distcpFolder, openDistcp }, { gptWeights }, { expectReplaceable }] = await Promise.all([
    import("../../runtime/checkpoint/megatron/distcp.ts"),
    import("../../runtime/checkpoint/megatron/gptWeights.ts"),
    import("../../runtime/checkpoint/hfFolder.ts"),
  ]);
  const isFile = options.out.endsWith(".safetensors");
  if (isFile) expectWritable(options.out);
  else expectReplaceable(options.out);
  const dist = openDistcp(distcpFolder(dir));
  try {
    const model = await modelOf(dist, options);
    // all weights are found before the first is written
    const weights = gptWeights(dist, model);
    const written = await (isFile ? writeFile : writeModel)(model, weights, options);
    printStdout(`${options.out}: ${written} of ${dist.folder}`);
  } finally {
    dist.close();
  }
}

async function writeFile(model: Job["model"], weights: NamedWeights, options: Options): Promise<string> {
  const [{ exportedTensors }, { writeHfFile }] = await Promise.all([
    import("../../runtime/checkpoint/hfExport.ts"),
    import("../../runtime/checkpoint/hfFolder.ts"),
  ]);
  const tensors = exportedTensors(model, weights, "fused");
  const { own } = dtypeNames[options.dtype ?? "fp32"];
  await writeHfFile(options.out, tensors, { dtype: own, onTensor: await progressOf(tensors, own) });
  return plural(tensors.length, "tensor");
}

async function writeModel(model: Job["model"], weights: NamedWeights, options: Options): Promise<string> {
  const [{ exportedTensors }, { writeHfFolder }, { configText }] = await Promise.all([
    import("../../runtime/checkpoint/hfExport.ts"),
    import("../../runtime/checkpoint/hfFolder.ts"),
    import("../convert/hf/exportConfig.ts"),
  ]);
  const { own, torch } = dtypeNames[options.dtype ?? "bf16"];
  const chosen = await configFor(model, { dtype: torch, initStd: 0.02, positions: options.maxPositions ?? model.seq }, options.family);
  const exported = chosen.config.num_nextn_predict_layers === undefined ? { ...model, mtp: null } : model;
  const tensors = exportedTensors(exported, weights, options.fused ? "fused" : chosen.experts);
  await writeHfFolder(options.out, tensors, {
    ...{ dtype: own, shardBytes: options.maxShard, copies: {} },
    texts: { "config.json": configText(chosen.config), "generation_config.json": jsonText({ _from_model_config: true }) },
    onTensor: await progressOf(tensors, own),
  });
  return `${chosen.family}, ${plural(tensors.length, "tensor")}`;
}

/** Returns the model of a checkpoint: of a config.json, or of the arguments that it was trained with. */
async function modelOf(dist: Distcp, { config, vocab }: Options): Promise<Job["model"]> {
  if (config !== undefined) {
    const [{ importHf }, { parseConfig }, { readConfigFile }, { completeJob, JobText }] = await Promise.all([
      import("../convert/hf/importHf.ts"),
      import("../convert/hf/configReader.ts"),
      import("./inputFiles.ts"),
      import("../../schemas/job.ts"),
    ]);
    const { text, file, name } = readConfigFile(config);
    const parsed = parseConfig(text, file);
    const mtp = [...dist.tensors.keys()].some((key) => key.startsWith("mtp."));
    return completeJob(JobText.parse(importHf(parsed, name, { mtp }).job)).model;
  }
  const [{ argumentsIn }, { expectPlainStorage, wordsOfArguments }, { importMegatron }, { readQuickly }] = await Promise.all([
    import("../../runtime/checkpoint/megatron/savedArguments.ts"),
    import("../convert/megatron/checkpointArguments.ts"),
    import("../convert/megatron/importMegatron.ts"),
    import("../frontend/readJob.ts"),
  ]);
  const args = argumentsIn(dist);
  const padded = args.get("padded_vocab_size");
  if (vocab !== undefined && typeof padded === "number" && vocab > padded)
    throw new Trouble(`--vocab ${vocab} exceeds the ${padded} rows of the embedding in ${dist.folder}`, "give the size of the tokenizer");
  const size = vocab ?? (typeof padded === "number" ? padded : undefined);
  expectPlainStorage(args);
  const words = [...wordsOfArguments(args), "--vocab-size", String(size ?? 0), "--make-vocab-size-divisible-by", "1"];
  const { text } = importMegatron(
    { kind: "words" },
    { name: "checkpoint", words, world: 1, hasTrained: true, ...(size !== undefined && { vocab: size }) },
  );
  const { job, findings } = readQuickly(text, "the arguments of the checkpoint", []);
  if (!job)
    throw new Trouble(`the arguments of ${dist.folder} make no valid model: ${findings[0]?.title}`, "give its config.json with --config");
  return job.model;
}
