/** What commands share that write a model in Hugging Face's form: options, the config, and progress. */
import { type Command, InvalidArgumentError, Option } from "commander";
import type { ExportedTensor } from "../../runtime/checkpoint/hfExport.ts";
import type { ExportDtype } from "../../runtime/checkpoint/hfFolder.ts";
import type { Job } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { ExportedConfig } from "../convert/hf/exportConfig.ts";
import { bytesText } from "../units.ts";
import { atLeastOne } from "./options.ts";
import { endProgress, printProgress, progressInterval } from "./output.ts";
import { duration } from "./progress.ts";

/** Options of the model that is written. */
export interface ModelOptions {
  readonly dtype?: keyof typeof dtypeNames;
  readonly fused?: true;
  readonly family?: string;
  readonly maxShard: number;
  readonly maxPositions?: number;
}

/** The element types by option: rankc's name, and PyTorch's for config.json. */
export const dtypeNames = {
  bf16: { own: "bf16", torch: "bfloat16" },
  fp16: { own: "f16", torch: "float16" },
  fp32: { own: "f32", torch: "float32" },
} as const satisfies Record<string, { own: ExportDtype; torch: string }>;

/** Adds the options of the model that is written. */
export const withModelOptions = (command: Command): Command =>
  command
    .addOption(new Option("--dtype <dtype>", "the type of the weights (default: bf16)").choices(Object.keys(dtypeNames)))
    .option("--fused", "one tensor for all experts of a layer, as transformers 5 has them in memory, instead of one for each expert")
    .option("--family <type>", "the model_type of the config (default: the first that describes the model)")
    .option("--max-shard <size>", "the most bytes of a file: 5GB, 500MB", sizeInBytes, 5e9)
    .option("--max-positions <n>", "max_position_embeddings of the config (default: model.seq)", atLeastOne);

/** Parses `5GB`, `500MB` or a number of bytes. Throws InvalidArgumentError. */
function sizeInBytes(text: string): number {
  const { n, unit } = /^(?<n>\d+(?:\.\d+)?)(?<unit>[KMGT]?B)?$/i.exec(text)?.groups ?? {};
  const scale = { B: 1, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 }[(unit ?? "B").toUpperCase()];
  const bytes = Number(n) * (scale ?? Number.NaN);
  if (!(bytes >= 1)) throw new InvalidArgumentError("It is not a size, such as 5GB or 500MB.");
  return bytes;
}

/** Returns indented JSON, with a final newline. */
export const jsonText = (value: object): string => `${JSON.stringify(value, null, 2)}\n`;

/** Returns the first config that, imported again, is the model. Throws a Trouble that lists the features that no family can express. */
export async function configFor(
  model: Job["model"],
  settings: { dtype: string; initStd: number; positions: number },
  family: string | undefined,
): Promise<ExportedConfig> {
  const [{ exportFamilies, hfConfigsOf }, { importHf }, { completeJob, JobText }, { modelDifferences }] = await Promise.all([
    import("../convert/hf/exportConfig.ts"),
    import("../convert/hf/importHf.ts"),
    import("../../schemas/job.ts"),
    import("../../runtime/checkpoint/mismatch.ts"),
  ]);
  if (family !== undefined && !exportFamilies.includes(family))
    throw new Trouble(`--family is "${family}"`, `the choices are ${exportFamilies.join(", ")}`);
  const all = hfConfigsOf(model, settings).filter((each) => family === undefined || each.family === family);
  const refused: { family: string; texts: readonly string[] }[] = [];
  for (const each of all)
    try {
      const { job } = importHf(each.config, "exported", { mtp: each.config.num_nextn_predict_layers !== undefined });
      const { mismatches } = modelDifferences(completeJob(JobText.parse(job)).model, model);
      if (mismatches.length === 0) return each;
      refused.push({ family: each.family, texts: mismatches.map(({ text }) => text.replace("in the checkpoint", `in ${each.family}`)) });
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      refused.push({ family: each.family, texts: error.message.split("\n").slice(1) });
    }
  const [closest] = refused.sort((a, b) => a.texts.length - b.texts.length);
  const why = closest ? `; the closest is ${closest.family}:${closest.texts.map((text) => `\n  ${text.trim()}`).join("")}` : "";
  throw new Trouble(
    `no${family === undefined ? "" : ` ${family}`} config of Hugging Face describes this model${why}`,
    "write one file for --init-from, -o model.safetensors, which takes any model",
  );
}

/** Returns a function that prints bytes and the time left, as often as progress lines may follow one another. */
export async function progressOf(tensors: readonly ExportedTensor[], dtype: ExportDtype): Promise<(bytes: number) => void> {
  const { bytesOfTensors } = await import("../../runtime/checkpoint/hfFolder.ts");
  const total = bytesOfTensors(tensors, dtype);
  const begun = performance.now();
  let printed = begun;
  return (bytes) => {
    const now = performance.now();
    if (now - printed < 1000 * progressInterval()) return;
    printed = now;
    const left = ((total - bytes) / bytes) * ((now - begun) / 1000);
    printProgress(`exported ${bytesText(bytes)} of ${bytesText(total)}  ${left > 0 ? `${duration(left)} left` : "done"}`);
    if (bytes === total) endProgress();
  };
}
