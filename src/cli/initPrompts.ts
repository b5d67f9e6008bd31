/** The questions of `rankc init` at a terminal. */
import type { Readable, Writable } from "node:stream";
import { isCancel, select, text } from "@clack/prompts";
import { type Device, deviceNames, devices } from "../../schemas/devices.ts";
import type { ModelName } from "../convert/presets/models.ts";
import { fewestGpus, listModels } from "../convert/presets/presetJob.ts";
import { bytesText, millionsText } from "../units.ts";

/** What options have answered already. */
interface Answered {
  readonly device: Device | undefined;
  readonly gpus: number | undefined;
  readonly gpusPerNode: number;
}

/** Asks for model, device and number of GPUs; undefined if the person cancels. `streams`: where the person is. */
export async function askSettings(
  { device: named, gpus: given, gpusPerNode }: Answered,
  streams: { readonly input: Readable; readonly output: Writable } = { input: process.stdin, output: process.stderr },
): Promise<{ model: ModelName; device: Device; gpus: number } | undefined> {
  const model = await select<ModelName>({
    ...streams,
    message: "Which model?",
    maxItems: 12,
    options: listModels().map(({ name, label, parameters }) => ({
      value: name,
      label: name,
      hint: `${label}, ${millionsText(parameters)} parameters`,
    })),
  });
  if (isCancel(model)) return undefined;
  const device =
    named ??
    (await select<Device>({
      ...streams,
      message: "Which device?",
      initialValue: "h100-80gb",
      options: deviceNames.map((name) => ({ value: name, label: name, hint: bytesText(devices[name].memory) })),
    }));
  if (isCancel(device)) return undefined;
  const least = given ?? fewestGpus(model, device, gpusPerNode) ?? 1;
  const answer =
    given ??
    (await text({
      ...streams,
      message: `How many GPUs? ${least} is the smallest power of 2 that ${model} fits`,
      initialValue: String(least),
      validate: (value) => (/^[1-9]\d{0,5}$/.test(value ?? "") ? undefined : "Write a whole number"),
    }));
  return isCancel(answer) ? undefined : { model, device, gpus: Number(answer) };
}
