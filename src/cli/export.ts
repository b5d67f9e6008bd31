import { join, resolve } from "node:path";
import type { Command } from "commander";
import type { OpenCheckpoint } from "../../runtime/checkpoint/checkpoint.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { plural } from "../units.ts";
import { registerExportPlan } from "./exportPlan.ts";
import { configFor, dtypeNames, jsonText, type ModelOptions, progressOf, withModelOptions } from "./hfModel.ts";
import { withExamples } from "./options.ts";
import { printStderr, printStdout } from "./output.ts";
import { expectWritable } from "./outputFiles.ts";

interface ExportOptions extends ModelOptions {
  readonly out: string;
  readonly tokenizer?: string;
  readonly every?: true;
}

/** Registers `export`: the weights of a checkpoint as a folder that Hugging Face transformers reads, and plans in the formats of other tools. */
export function registerExport(program: Command): void {
  const exports = program.command("export").description("convert a plan, or the result of a run, for other tools");
  registerExportHf(exports);
  registerExportPlan(exports);
}

function registerExportHf(exports: Command): void {
  withExamples(
    withModelOptions(
      exports
        .command("hf")
        .description("write the weights of a checkpoint as a folder for from_pretrained of Hugging Face, vLLM and llama.cpp")
        .argument("<checkpoint>", "a checkpoint, or a folder of checkpoints (the newest is used)")
        .requiredOption(
          "-o, --out <dir>",
          "the folder to write; a name that ends in .safetensors: one file in fp32 without a config, of any model",
        )
        .option("--tokenizer <path>", "the tokenizer, a file or its folder (default: data.tokenizer of the job, if it is there)")
        .option("--every", "export every checkpoint of the folder, each to a folder of its step, and each new one while a run saves there"),
    ),
    "export hf checkpoints/ -o model/",
    "export hf checkpoints/step-00002000 -o model/ --tokenizer tokenizer/",
    "export hf checkpoints/ -o exported/ --every",
    "export hf checkpoints/ -o model.safetensors",
  ).action(async (checkpoint: string, options: ExportOptions) => {
    if (options.every) await exportEvery(checkpoint, options);
    else await exportNewest(checkpoint, options);
  });
}

async function exportNewest(checkpoint: string, options: ExportOptions): Promise<void> {
  const { chooseCheckpoint } = await import("../../runtime/checkpoint/saveFolder.ts");
  const single = options.out.endsWith(".safetensors");
  if (single) expectWritable(options.out);
  else (await import("../../runtime/checkpoint/hfFolder.ts")).expectReplaceable(options.out);
  const { at, notes } = chooseCheckpoint(checkpoint);
  for (const note of notes) printStderr(`note: ${note}`);
  await (single ? exportFile(at, options) : exportFolder(at, options.out, options));
}

/** How often `--every` looks for a new checkpoint, in milliseconds. */
const LOOK = 1000;

/** Exports the checkpoints of a folder that are not exported yet, until no run saves there. */
async function exportEvery(folder: string, options: ExportOptions): Promise<void> {
  const { checkpointsIn, isLocked } = await import("../../runtime/checkpoint/saveFolder.ts");
  if (options.out.endsWith(".safetensors")) throw new Trouble("--every writes a folder for each checkpoint", "name a folder after -o");
  for (let isLast = false; ; ) {
    const exported = new Set(checkpointsIn(options.out).map(({ name }) => name));
    const due = checkpointsIn(folder).filter(({ name, whole }) => whole && !exported.has(name));
    for (const { name } of due)
      try {
        await exportFolder(join(folder, name), join(options.out, name), options);
      } catch (error) {
        // --keep of the run may remove a checkpoint while it is read
        if (checkpointsIn(folder).some((found) => found.name === name && found.whole)) throw error;
        printStderr(`note: ${join(folder, name)} was removed before it was exported`);
      }
    if (isLast && due.length === 0) return;
    isLast = !isLocked(folder);
    if (!isLast) await new Promise((resolve) => setTimeout(resolve, LOOK));
  }
}

async function exportFile(at: string, options: ExportOptions): Promise<void> {
  const [{ openCheckpoint }, { exportedTensors }, { writeHfFile }] = await Promise.all([
    import("../../runtime/checkpoint/checkpoint.ts"),
    import("../../runtime/checkpoint/hfExport.ts"),
    import("../../runtime/checkpoint/hfFolder.ts"),
  ]);
  const { out } = options;
  const checkpoint = openCheckpoint(at);
  try {
    const tensors = exportedTensors(checkpoint.model(), checkpoint, "fused");
    const { own } = dtypeNames[options.dtype ?? "fp32"];
    await writeHfFile(out, tensors, { dtype: own, onTensor: await progressOf(tensors, own) });
    printStdout(`${out}: ${tensors.length} tensors of ${checkpoint.folder}, after step ${checkpoint.progress.steps}`);
  } finally {
    checkpoint.close();
  }
}

async function exportFolder(at: string, out: string, options: ExportOptions): Promise<void> {
  const [{ openCheckpoint }, { exportedTensors }, { bytesOfTensors, writeHfFolder }, { openExportThreads }] = await Promise.all([
    import("../../runtime/checkpoint/checkpoint.ts"),
    import("../../runtime/checkpoint/hfExport.ts"),
    import("../../runtime/checkpoint/hfFolder.ts"),
    import("../../runtime/checkpoint/exportThread.ts"),
  ]);
  const { configText } = await import("../convert/hf/exportConfig.ts");
  const { own, torch } = dtypeNames[options.dtype ?? "bf16"];
  const checkpoint = openCheckpoint(at);
  try {
    const model = checkpoint.model();
    const { job } = checkpoint;
    const initStd = (job.train as { init_std?: number }).init_std ?? 0.02;
    const chosen = await configFor(model, { dtype: torch, initStd, positions: options.maxPositions ?? model.seq }, options.family);
    const tokenizer = await tokenizerOf(checkpoint, options.tokenizer);
    // configs of other families have no multi-token prediction
    const exported = chosen.config.num_nextn_predict_layers === undefined ? { ...model, mtp: null } : model;
    if (model.mtp && !exported.mtp) printStderr(`note: ${chosen.family} has no multi-token prediction: its layers are left out`);
    const experts = options.fused ? "fused" : chosen.experts;
    const tensors = exportedTensors(exported, checkpoint, experts);
    const ids = tokenizer?.ids ?? {};
    const texts = {
      "config.json": configText({ ...chosen.config, ...ids }),
      "generation_config.json": jsonText({ _from_model_config: true, ...ids }),
      ...tokenizer?.texts,
    };
    const writers = openExportThreads({ checkpoint: at, model: exported, experts, dtype: own }, bytesOfTensors(tensors, own));
    try {
      await writeHfFolder(out, tensors, {
        ...{ dtype: own, shardBytes: options.maxShard, texts, copies: tokenizer?.copies ?? {} },
        ...(writers && { writers }),
        onTensor: await progressOf(tensors, own),
      });
    } finally {
      await writers?.close();
    }
    printStdout(
      `${out}: ${chosen.family}, ${plural(tensors.length, "tensor")} of ${checkpoint.folder}, after step ${checkpoint.progress.steps}`,
    );
  } finally {
    checkpoint.close();
  }
}

/** Returns the files of the tokenizer; undefined if the job reads bytes, or if they are not here. */
async function tokenizerOf({ job }: OpenCheckpoint, given: string | undefined) {
  const { tokenizerFiles } = await import("../../runtime/checkpoint/tokenizerFiles.ts");
  const { tokenizer = "bytes" } = (job as { data?: { tokenizer?: string } }).data ?? {};
  const path = given ?? (tokenizer === "bytes" ? undefined : tokenizer);
  const files = path === undefined ? undefined : tokenizerFiles(resolve(path));
  if (given !== undefined && !files) throw new Trouble(`${given} holds no files of a tokenizer`, "name tokenizer.json or its folder");
  if (path !== undefined && !files) printStderr(`note: the job's tokenizer, ${path}, is not here: --tokenizer says where it is`);
  return files;
}
