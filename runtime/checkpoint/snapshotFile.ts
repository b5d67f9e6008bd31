/** Reads and writes snapshot.json, the description of a checkpoint: run progress, job, mesh, shardings, and a digest of each tensor file. */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { z } from "zod";
import { MeshText } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";

const FORMAT = 2;
/** The file name of the description. */
export const TEXT = "snapshot.json";

const count = z.int().nonnegative();
const sha256 = z.string().regex(/^[0-9a-f]{64}$/);
const MilestoneText = z.strictObject({
  ...{ steps: count, read: count, trained: count, updates: count },
  loss_scale: z
    .strictObject({ scale: z.number(), well: count, patience: z.int() })
    .nullable()
    .describe("the state of a dynamic fp16 loss scale; null if there is none"),
});
const Tensor = z.strictObject({ stage: count, sizes: z.array(count), shardedBy: z.array(z.array(count)) });
const File = z.strictObject({ step: count, header_sha256: sha256.describe("of the header, which holds a SHA-256 of each tensor") });
const CheckpointText = z.strictObject({
  format: z.literal(FORMAT),
  rankc: z.string(),
  progress: MilestoneText.describe("the run progress"),
  job: z.looseObject({ model: z.looseObject({}), train: z.looseObject({ optimizer: z.looseObject({ type: z.string() }) }) }),
  mesh: MeshText,
  tensors: z
    .record(z.string(), Tensor)
    .describe("by name: the stage, the sizes of the whole tensor, and per dim the sub-axes that shard it"),
  files: z.record(z.string(), File).describe("by name: the step and the digest"),
});
/** The content of snapshot.json. */
export type CheckpointText = z.infer<typeof CheckpointText>;

const digestOf = (value: unknown): string => createHash("sha256").update(JSON.stringify(value)).digest("hex");

/** Returns the text of snapshot.json, which begins with the SHA-256 of the rest. */
export function printCheckpointText(text: Omit<CheckpointText, "format">): string {
  const whole: CheckpointText = { format: FORMAT, ...text };
  return `${JSON.stringify({ sha256: digestOf(whole), ...whole })}\n`;
}

const ANOTHER = "use another checkpoint of the run";

/** Reads snapshot.json. Throws a Trouble if the file cannot be read, has another format, or was changed after it was saved. */
export function readCheckpointText(path: string): CheckpointText {
  let value: unknown;
  try {
    value = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    const what = error instanceof SyntaxError ? "is not JSON" : `cannot be read (${(error as NodeJS.ErrnoException).code})`;
    throw new Trouble(`${path} ${what}`, ANOTHER);
  }
  const { sha256: digest, ...rest } = (typeof value === "object" && value !== null ? value : {}) as Record<string, unknown>;
  if (rest.format !== FORMAT)
    throw new Trouble(
      `${path} has checkpoint format ${JSON.stringify(rest.format)}, and this version of rankc reads format ${FORMAT}`,
      `export its weights with rankc ${JSON.stringify(rest.rankc)}, which saved it: rankc export hf; then --init-from`,
    );
  if (digest !== digestOf(rest))
    throw new Trouble(`${path} was changed after it was saved: its SHA-256 differs from the recorded one`, ANOTHER);
  const { success, data, error } = CheckpointText.safeParse(rest);
  if (success) return data;
  const [issue] = error.issues;
  throw new Trouble(`${path}: ${issue?.path.join(".") || "the file"}: ${issue?.message}`, ANOTHER);
}
