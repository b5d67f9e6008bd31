/** Labels for a corpus, made where a test runs: runs of tokens that are learnt and runs that are ignored, as in dialogues. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { IGNORED } from "../../runtime/data/tokens.ts";
import { random } from "./opCases.ts";

/** Some microbatches have many labels and some few; `learnt`: the share that is, all in all. */
function someLabels(ids: ArrayLike<number>, learnt = 0.4): Int32Array {
  const next = random(11);
  const labels = new Int32Array(ids.length).fill(IGNORED);
  for (let at = 0; at < ids.length; ) {
    const run = 1 + Math.floor(20 * (next() + 1));
    const keep = (next() + 1) / 2 < learnt;
    for (let i = at; i < Math.min(ids.length, at + run); i++) if (keep) labels[i] = ids[i]!;
    at += run;
  }
  return labels;
}

export const littleEndian = (numbers: ArrayLike<number>, dtype: "u16" | "u32" | "i32"): Uint8Array => {
  const width = dtype === "u16" ? 2 : 4;
  const view = new DataView(new ArrayBuffer(numbers.length * width));
  const set = { u16: view.setUint16, u32: view.setUint32, i32: view.setInt32 }[dtype].bind(view);
  for (let i = 0; i < numbers.length; i++) set(i * width, numbers[i]!, true);
  return new Uint8Array(view.buffer);
};

/** The path of labels for a text of bytes; the file goes when `remove` is called. */
export function labelsBeside(corpus: string, of = someLabels): { readonly path: string; readonly remove: () => void } {
  const folder = mkdtempSync(join(tmpdir(), "rankc-labels-"));
  const path = join(folder, "labels.bin");
  writeFileSync(path, littleEndian(of(readFileSync(corpus)), "i32"));
  return { path, remove: () => rmSync(folder, { recursive: true }) };
}
