/** PREFIX.json: how rankc prepared a data set. */
import { z } from "zod";
import { Trouble } from "../../../schemas/trouble.ts";
import { isThere, readWhole } from "../inputFile.ts";

const DatasetDescription = z.object({
  tokenizer: z.string(),
  tokenizer_sha256: z.string(),
  encoding: z.string().optional(),
  kind: z.string(),
  vocab: z.int(),
  end_of_document: z.int().nullable(),
  dtype: z.enum(["u16", "i32"]),
  documents: z.int(),
  empty_documents: z.int(),
  tokens: z.number(),
  text_bytes: z.number(),
  inputs: z.array(z.string()),
});
/** The content of PREFIX.json. `tokenizer`: its absolute path, or `bytes`. */
export type DatasetDescription = z.output<typeof DatasetDescription>;

/** Reads PREFIX.json; undefined if there is none. Throws a Trouble if it is damaged. */
export function readDescription(prefix: string): DatasetDescription | undefined {
  const path = `${prefix}.json`;
  if (!isThere(path)) return undefined;
  try {
    return DatasetDescription.parse(JSON.parse(Buffer.from(readWhole(path, "the description of the data set")).toString()));
  } catch (error) {
    if (error instanceof Trouble) throw error;
    throw new Trouble(`${path} does not describe a data set that rankc prepared`, "prepare the data set again, or remove the file");
  }
}
