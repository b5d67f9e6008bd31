import type { Command } from "commander";
import { withExamples } from "./options.ts";
import { printStderr, printStdout } from "./output.ts";
import { expectWritable } from "./outputFiles.ts";

/** Registers `export hf`: writes the weights of a checkpoint as a Hugging Face safetensors file. */
export function registerExport(program: Command): void {
  withExamples(
    program
      .command("export")
      .description("convert the result of a run for other tools")
      .command("hf")
      .description("write the weights of a checkpoint for Hugging Face transformers: one safetensors file in fp32")
      .argument("<checkpoint>", "a checkpoint, or a folder of checkpoints (the newest is used)")
      .requiredOption("-o, --out <file>", "the .safetensors file to write"),
    "export hf checkpoints/ -o model.safetensors",
  ).action(async (checkpoint: string, options: { out: string }) => {
    const [{ openCheckpoint }, { chooseCheckpoint }, { toHuggingFace }, { writeSafetensors }] = await Promise.all([
      import("../../runtime/checkpoint/checkpoint.ts"),
      import("../../runtime/checkpoint/saveFolder.ts"),
      import("../../runtime/checkpoint/hf.ts"),
      import("../../runtime/checkpoint/safetensors.ts"),
    ]);
    expectWritable(options.out);
    const { at, notes } = chooseCheckpoint(checkpoint);
    for (const note of notes) printStderr(`note: ${note}`);
    const { folder, progress, model, whole, close } = openCheckpoint(at);
    try {
      const entries = toHuggingFace(model(), { get: whole });
      writeSafetensors(options.out, entries);
      printStdout(`${options.out}: ${entries.length} tensors of ${folder}, after step ${progress.steps}`);
    } finally {
      close();
    }
  });
}
