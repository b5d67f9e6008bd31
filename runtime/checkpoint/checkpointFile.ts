/** The text of a snapshot, snapshot.json: all that a run remembers beside tensors, and a digest of each file beside it. */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { z } from "zod";
import { MeshText } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";

const FORMAT = 2;
export const TEXT = "snapshot.json";

const count = z.int().nonnegative();
const sha256 = z.string().regex(/^[0-9a-f]{64}$/);
const MilestoneText = z.strictObject({
  ...{ steps: count, read: count, trained: count, updates: count },
  loss_scale: z
    .strictObject({ scale: z.number(), well: count, patience: z.int() })
    .nullable()
    .describe("of an fp16 scale that adapts itself; null where there is none"),
});
const Tensor = z.strictObject({ stage: count, sizes: z.array(count), shardedBy: z.array(z.array(count)) });
const File = z.strictObject({ step: count, header_sha256: sha256.describe("of the header, which holds a SHA-256 of each tensor") });
const SnapshotText = z.strictObject({
  format: z.literal(FORMAT),
  rankc: z.string(),
  progress: MilestoneText.describe("how far the run was"),
  job: z.looseObject({ model: z.looseObject({}), train: z.looseObject({ optimizer: z.looseObject({ type: z.string() }) }) }),
  mesh: MeshText,
  tensors: z.record(z.string(), Tensor).describe("by name: the stage it is on, its whole sizes, and per dim the factors that cut it"),
  files: z.record(z.string(), File).describe("by name: the step it is of, and its digest"),
});
export type SnapshotText = z.infer<typeof SnapshotText>;

const digestOf = (value: unknown): string => createHash("sha256").update(JSON.stringify(value)).digest("hex");

/** The bytes of snapshot.json: the text, and its own SHA-256 first. */
export function printSnapshotText(text: Omit<SnapshotText, "format">): string {
  const whole: SnapshotText = { format: FORMAT, ...text };
  return `${JSON.stringify({ sha256: digestOf(whole), ...whole })}\n`;
}

const ANOTHER = "take another snapshot of the run";

/** Throws a Trouble where it cannot be read, is of another format, or was changed after it was saved. */
export function readSnapshotText(path: string): SnapshotText {
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
      `${path} has snapshot format ${JSON.stringify(rest.format)}, and this rankc reads format ${FORMAT}`,
      `export its weights with the rankc that saved it, ${JSON.stringify(rest.rankc)}: rankc export hf; then --init-from`,
    );
  if (digest !== digestOf(rest))
    throw new Trouble(`${path} was changed after it was saved: its SHA-256 differs from the one that it states`, ANOTHER);
  const { success, data, error } = SnapshotText.safeParse(rest);
  if (success) return data;
  const [issue] = error.issues;
  throw new Trouble(`${path}: ${issue?.path.join(".") || "the file"}: ${issue?.message}`, ANOTHER);
}
