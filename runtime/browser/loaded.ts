/** What `rankc serve` serves beside the page: the plan, its kernels, and its text. */

import { indexPath } from "../../schemas/dataFiles.ts";
import { entryOf, sourceOf } from "../../schemas/lookup.ts";
import type { Plan } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { Text } from "../data/tokens.ts";
import type { Corpus } from "../train/inputs.ts";

/** A plan and the text of each of its kernels by the name of its file. */
export interface Loaded {
  readonly plan: Plan;
  readonly kernel: (file: string) => string;
}

export async function loadPlan(): Promise<Loaded> {
  const plan: Plan = await (await get("plan.json")).json();
  const files = plan.kernels.map((k) => sourceOf(k).file);
  const texts = new Map(await Promise.all(files.map(async (file) => [file, await (await get(`kernels/${file}`)).text()] as const)));
  return { plan, kernel: (file) => entryOf(texts, file, "source") };
}

/** The files of `data`. An index that has no bytes is none. */
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

export async function readText(file: File): Promise<Text> {
  const bytes = await file.arrayBuffer().catch(() => {
    throw new Trouble(`${file.name} cannot be read`, "see whether it is still there and may be read, then choose it again");
  });
  return textOf(file.name, bytes);
}

function textOf(path: string, buffer: ArrayBuffer): Text {
  const bytes = new Uint8Array(buffer);
  return { path, bytes: bytes.length, read: (into, at) => into.set(bytes.subarray(at, at + into.length)) };
}

/** The server says in words what is wrong. */
async function get(path: string): Promise<Response> {
  const answer = await fetch(path).catch(() => {
    throw new Trouble("the server does not answer", "see whether `rankc serve` still runs, then load the page again");
  });
  if (!answer.ok) throw new Trouble((await answer.text()).trim());
  return answer;
}
