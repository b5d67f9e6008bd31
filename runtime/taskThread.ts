/** A thread that performs tasks in the order in which it receives them. */
import { parentPort, type ResourceLimits, type Worker } from "node:worker_threads";
import { Trouble } from "../schemas/trouble.ts";
import { startThread } from "./thread.ts";

interface Answer<Result> {
  readonly result?: Result;
  readonly error?: { readonly code: string | undefined; readonly message: string; readonly fix: string | undefined };
}

/** A thread of the module at `url`, which calls `serveTasks`. A task under way keeps the process alive. */
export class TaskThread<Task, Result> {
  readonly #worker: Worker;
  readonly #waiting: { readonly resolve: (result: Result) => void; readonly reject: (error: Error) => void }[] = [];

  constructor(url: string, workerData: unknown, resourceLimits?: ResourceLimits) {
    this.#worker = startThread(url, { workerData, ...(resourceLimits && { resourceLimits }) });
    this.#worker.on("message", ({ result, error }: Answer<Result>) => {
      const next = this.#waiting.shift();
      if (this.#waiting.length === 0) this.#worker.unref();
      if (error) next?.reject(asError(error));
      else next?.resolve(result as Result);
    });
    this.#worker.on("error", (error: Error) => {
      for (const { reject } of this.#waiting.splice(0)) reject(error);
    });
    this.#worker.unref();
  }

  /** Performs a task. Rejects with the error of the task: a Trouble, or one with the code of a system error. */
  perform(task: Task): Promise<Result> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject });
      this.#worker.ref();
      this.#worker.postMessage(task);
    });
  }

  /** Ends the thread, also within a task. */
  async close(): Promise<void> {
    await this.#worker.terminate();
  }
}

function asError({ code, message, fix }: NonNullable<Answer<unknown>["error"]>): Error {
  if (fix !== undefined) return new Trouble(message, fix);
  return Object.assign(new Error(message), code !== undefined && { code });
}

/** Answers the tasks that this thread receives. */
export function serveTasks<Task, Result>(perform: (task: Task) => Result | Promise<Result>): void {
  let last: Promise<unknown> = Promise.resolve();
  parentPort?.on("message", (task: Task) => {
    last = last.then(async () => {
      let answer: Answer<Result>;
      try {
        answer = { result: await perform(task) };
      } catch (error) {
        const { code, message, fix } = error as NodeJS.ErrnoException & Partial<Trouble>;
        answer = { error: { code, message, fix } };
      }
      parentPort?.postMessage(answer);
    });
  });
}
