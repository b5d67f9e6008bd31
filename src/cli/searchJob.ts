/** Reads the job of `search`: its degrees are free, so rules judge the choices and not the file. */
import { completeJob, type Job, JobText } from "../../schemas/job.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { autoKeysIn, withoutAuto } from "../frontend/auto.ts";
import { hasErrors } from "../frontend/diagnostic.ts";
import { readSource } from "../frontend/jobFiles.ts";
import { readQuickly } from "../frontend/readJob.ts";
import { type FixedKeys, recomputeChoices, type SearchedKey, type SideKey, searchedKeys, sideChoices, sideKeys } from "../search/choice.ts";
import { fixedBut } from "../search/chooseAuto.ts";
import { jobFiles } from "./jobFiles.ts";
import { InvalidJob, jobTextAt, printFindings } from "./loadPlan.ts";
import type { JobOptions } from "./options.ts";
import { interpretSchemas } from "./zodSettings.ts";

/** What a search changes in a job before it begins. */
export interface SearchedJob extends JobOptions {
  readonly gpus?: number;
  readonly device?: string;
}

/** The job of a search: with degrees of 1, and as its file has it if it has as many ranks. */
export interface SearchedJobs {
  readonly job: Job;
  /** Of a job that leaves keys as `auto`: the values of all others. */
  readonly fixed: FixedKeys;
  readonly written?: Job;
}

/** Returns the job of a search. Prints findings and throws InvalidJob if a key is wrong, or a Trouble if the file cannot be read. */
export async function loadSearchJob(path: string, { set, overlay, gpus, device }: SearchedJob): Promise<SearchedJobs> {
  interpretSchemas();
  const text = await jobTextAt(path);
  const sets = [...set, ...(device === undefined ? [] : [`cluster.device=${device}`])];
  const files = jobFiles(overlay);
  const { source, findings } = readSource(text, path, sets, files);
  const keys = autoKeysIn(source);
  const read = JobText.safeParse(withoutAuto(source, keys).value);
  if (hasErrors(findings) || !read.success) {
    await printFindings(readQuickly(text, path, sets, files).findings);
    throw new InvalidJob();
  }
  const { data: _, layout: __, ...parallel } = read.data.parallel;
  const world = gpus ?? parallel.world;
  const { nodes: ___, ...cluster } = read.data.cluster;
  const job = completeJob({
    ...read.data,
    cluster,
    parallel: {
      ...{ ...parallel, world, tensor: 1, pipeline: 1, virtual_pipeline: 1, context: 1, expert: 1, expert_tensor: 1 },
      ...{ sequence: false, layout: null },
    },
  });
  if (keys.length > 0) return { job, fixed: fixedBut(completeJob(read.data), keys) };
  return { job, fixed: {}, ...(world === parallel.world && { written: completeJob(read.data) }) };
}

/** Parses the values of `--fix`. Throws a Trouble if a key or a value is unknown, or if the job has no use for it. */
export function fixedKeys(texts: readonly string[], job: Job): FixedKeys {
  const fixed: Partial<Record<SearchedKey, number | string>> = {};
  for (const text of texts) {
    const [name = "", value = ""] = text.split("=");
    const key = searchedKeys.find((known) => known === name);
    if (key === undefined) throw new Trouble(`--fix ${text}: search does not choose ${name}`, `write one of ${searchedKeys.join(", ")}`);
    if (fixed[key] !== undefined) throw new Trouble(`--fix names ${key} twice`, `keep one of ${key}=${fixed[key]} and ${text}`);
    const mode = recomputeChoices.find((known) => known === value);
    if (key === "recompute") {
      if (mode === undefined) throw new Trouble(`--fix ${text}: unknown value`, `write one of ${recomputeChoices.join(", ")}`);
      fixed.recompute = mode;
    } else if (isSideKey(key)) {
      fixed[key] = sideValue(key, value);
      if (!job.model.moe && ofExperts.includes(key) && value !== "job" && value !== "none")
        throw new Trouble(`--fix ${text}: the model has no experts`, "leave it out");
    } else if (/^[1-9]\d{0,5}$/.test(value)) fixed[key] = Number(value);
    else throw new Trouble(`--fix ${text}: ${value} is not a number from 1 to 999,999`, `write ${key}=N`);
  }
  // each value has been checked against those of its key
  return fixed as FixedKeys;
}

/** Keys beside the mesh that change how rows reach experts. */
const ofExperts: readonly SideKey[] = ["dispatch", "expert_overlap", "rows_bound"];

const isSideKey = (key: SearchedKey): key is SideKey => sideKeys.some((side) => side === key);

/** Parses the value of a key beside the mesh. Throws a Trouble if the key has no such value. */
function sideValue(key: SideKey, value: string): number | string {
  const words: readonly (string | number)[] = sideChoices[key];
  if (value === "job" || words.includes(value)) return value;
  const isNumber = key === "rows_bound" || key === "gradient_bucket";
  if (isNumber && /^\d{1,6}(\.\d{1,3})?$/.test(value) && Number(value) >= 1) return Number(value);
  const known = ["job", ...words.filter((word) => typeof word === "string"), ...(isNumber ? ["a number from 1 to 999,999"] : [])];
  throw new Trouble(`--fix ${key}=${value}: unknown value`, `write ${known.slice(0, -1).join(", ")} or ${known.at(-1)}`);
}
