/** Threads that write the tensors of an export: each opens the checkpoint, and reads, transposes, rounds and writes one tensor
 * after the other. */
import { availableParallelism } from "node:os";
import { workerData } from "node:worker_threads";
import type { Job } from "../../schemas/job.ts";
import { moduleUrl } from "../moduleUrl.ts";
import { serveTasks, TaskThread } from "../taskThread.ts";
import { openCheckpoint } from "./checkpoint.ts";
import { EncodeBuffer } from "./exportMemory.ts";
import { type ExpertNames, exportedTensors } from "./hfExport.ts";
import { type ExportDtype, type ExportWriters, type TensorTask, writeTensor } from "./hfFolder.ts";

/** What is exported: all that a thread needs to make the same list of tensors. */
export interface ExportSource {
  readonly checkpoint: string;
  readonly model: Job["model"];
  readonly experts: ExpertNames;
  readonly dtype: ExportDtype;
}

/** Bytes for which a thread pays. */
const SHARE = 2 ** 27;
/** Bytes of memory of a thread, with its heap. */
const THREAD = 2 ** 26;
/** The limit of a thread's young objects, in MB: its heap stays small. */
const YOUNG = 4;

/** Opens threads for an export of so many bytes, at most `most`; undefined: this thread is as fast, or memory lacks for several. */
export function openExportThreads(source: ExportSource, bytes: number, most = availableParallelism()): ExportWriters | undefined {
  const room = Math.floor(process.availableMemory() / 2 / THREAD);
  const count = Math.min(most, 16, Math.floor(bytes / SHARE), room);
  if (count < 2) return undefined;
  const url = moduleUrl("checkpoint/exportThread", import.meta.url);
  const threads = Array.from(
    { length: count },
    () => new TaskThread<TensorTask, number>(url, { exportThread: source }, { maxYoungGenerationSizeMb: YOUNG }),
  );
  return {
    count,
    async write(writer, task) {
      return (await threads[writer]?.perform(task)) ?? 0;
    },
    async close() {
      await Promise.all(threads.map((thread) => thread.close()));
    },
  };
}

const given = (workerData as { exportThread?: ExportSource } | null)?.exportThread;
if (given) {
  const tensors = exportedTensors(given.model, openCheckpoint(given.checkpoint), given.experts);
  const encode = new EncodeBuffer();
  serveTasks((task: TensorTask) => {
    const tensor = tensors[task.tensor];
    if (!tensor) throw new Error(`rankc: the export has no tensor ${task.tensor}`);
    return writeTensor(task, tensor, given.dtype, encode);
  });
}
