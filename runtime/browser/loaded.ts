/** Loads the files that `rankc serve` offers: the plan, its kernels, and its corpus. */

import { indexPath } from "../../schemas/dataFiles.ts";
import { entryOf, sourceOf } from "../../schemas/lookup.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { Text } from "../data/tokens.ts";
import type { Corpus } from "../train/inputs.ts";

/** A plan, and the source of a kernel by its file name. */
export interface Loaded {
  readonly plan: Plan;
  readonly kernel: (file: string) => string;
}

/** Loads the plan and its kernels. Throws a Trouble if the server does not answer. */
export async function loadPlan(): Promise<Loaded> {
  const plan: Plan = await (await get("plan.json")).json();
  const files = plan.kernels.map((k) => sourceOf(k).file);
  const texts = new Map(await Promise.all(files.map(async (file) => [file, await (await get(`kernels/${file}`)).text()] as const)));
  return { plan, kernel: (file) => entryOf(texts, file, "source") };
}

/** Loads the files of `data`. The server sends an empty index if there is none. */
export async function loadCorpus({ job }: Plan): Promise<Corpus> {
  const { path, format, labels } = job.data;
  const load = async (name: string, as: string): Promise<Text> => textOf(as, await (await get(name)).arrayBuffer());
  const index = format === "tokens" ? await load("index", indexPath(path) ?? path) : undefined;
  return {
    ids: await load("corpus", path),
    ...(index && index.bytes > 0 && { index }),
    ...(labels !== null && { labels: await load("labels", labels) }),
  };
}

/** Reads a file that the user chose. Throws a Trouble if it cannot be read. */
export async function readText(file: File): Promise<Text> {
  const bytes = await file.arrayBuffer().catch(() => {
    throw new Trouble(`${file.name} cannot be read`, "check that it exists and is readable, then choose it again");
  });
  return textOf(file.name, bytes);
}

function textOf(path: string, buffer: ArrayBuffer): Text {
  const bytes = new Uint8Array(buffer);
  return { path, bytes: bytes.length, read: (into, at) => into.set(bytes.subarray(at, at + into.length)) };
}

/** Fetches a path; an error of the server is text, and becomes a Trouble. */
async function get(path: string): Promise<Response> {
  const answer = await fetch(path).catch(() => {
    throw new Trouble("the server does not answer", "check that `rankc serve` runs, then reload the page");
  });
  if (!answer.ok) throw new Trouble((await answer.text()).trim());
  return answer;
}
