/** Starts a module as a thread. */
import { Worker, type WorkerOptions } from "node:worker_threads";

/** Starts the module at `url`. In a checkout it is TypeScript, and the thread registers the tsx loader first. */
export function startThread(url: string, options: Pick<WorkerOptions, "workerData" | "transferList">): Worker {
  if (!url.endsWith(".ts")) return new Worker(new URL(url), options);
  const loader = import.meta.resolve("tsx/esm/api");
  const start = `import(${JSON.stringify(loader)}).then(({ register }) => (register(), import(${JSON.stringify(url)})))`;
  return new Worker(start, { ...options, eval: true });
}
