/**
 * The doctor: checks what a run needs on this machine, from Node to a collective on GPUs, and reports a fix for each failure. The checks of
 * a backend belong to its row (backends.ts); each backend is checked independently of the others.
 */
import { Trouble } from "../schemas/trouble.ts";
import { type BackendName, backendNames, backends, forEachBackend } from "./backends.ts";
import { type Check, CheckList, type DiagnoseSettings } from "./checkList.ts";
import type { Survey } from "./webgpu/probe.ts";

/** The result of all checks. */
export type Diagnosis = {
  /** The state of CUDA. ready: plans run. partly: kernels run on one GPU, and something else is missing. no: no kernel runs. */
  readonly verdict: "ready" | "partly" | "no";
  /** The backends on which plans run here: all their checks have passed. */
  readonly works: Readonly<Record<BackendName, boolean>>;
  /** The adapter, if there is one. */
  readonly webgpu?: Survey;
  readonly checks: readonly Check[];
};

/** Runs all checks. Does not throw: a failure is the result of a check. */
export async function diagnose(settings: DiagnoseSettings): Promise<Diagnosis> {
  const list = new CheckList(settings);
  list.check(backendNames, "node", () => [nodeVersion()]);
  let webgpu: Survey | undefined;
  for (const name of backendNames.toReversed()) webgpu = (await backends[name].check(list)) ?? webgpu;

  const { checks } = list;
  const works = (backend: BackendName): boolean => checks.every((c) => c.ok || !c.for.includes(backend));
  const launched = checks.some(({ name, ok }) => name === "launch" && ok);
  return {
    verdict: works("cuda") ? "ready" : launched ? "partly" : "no",
    works: forEachBackend(works),
    ...(webgpu && { webgpu }),
    checks,
  };
}

const verdicts: Record<Diagnosis["verdict"], string> = {
  ready: "CUDA: the driver, the compiler, a kernel and collectives work on this machine's GPUs.",
  partly: "CUDA: kernels run on this machine's GPU, but something that plans need is missing.",
  no: "CUDA: this machine cannot run plans on it.",
};

/** Formats a diagnosis as a list, with a fix under each failure. */
export function printDiagnosis({ verdict, works, checks }: Diagnosis): string {
  const width = Math.max(...checks.map(({ name }) => name.length));
  const indent = " ".repeat(width + 6);
  const lines = checks.flatMap(({ name, ok, found, fix, for: backends }) => [
    `${ok ? "ok" : backends.length ? "no" : "--"}  ${name.padEnd(width)}  ${found.replaceAll("\n", `\n${indent}`)}`,
    ...(fix === undefined ? [] : [`${indent}fix: ${fix}`]),
  ]);
  const here = Object.entries(works).flatMap(([backend, all]) => (all ? [backend] : []));
  return [...lines, "", verdicts[verdict], `Plans run here on: ${here.join(", ") || "nothing"}.`].join("\n");
}

function nodeVersion(): string {
  if (Number(process.versions.node.split(".")[0]) < 20) throw new Trouble(process.version, "use Node 20.19 or later");
  return process.version;
}
