/** Starts a module as a thread. */
import { Worker, type WorkerOptions } from "node:worker_threads";
import { importText, isTypeScript } from "./moduleUrl.ts";

/** Starts the module at `url`. In a checkout it is TypeScript, and the thread registers the tsx loader first. */
export const startThread = (url: string, options: Pick<WorkerOptions, "workerData" | "transferList" | "resourceLimits">): Worker =>
  isTypeScript(url) ? new Worker(importText(url), { ...options, eval: true }) : new Worker(new URL(url), options);
