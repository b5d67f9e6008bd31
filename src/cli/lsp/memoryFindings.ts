/** The findings of a job that need a compiled plan, in a process of their own: an edit ends it, and typing never waits for it. */
import { type ChildProcess, spawn } from "node:child_process";
import { json } from "node:stream/consumers";
import type { Finding } from "../../frontend/diagnostic.ts";
import { readJobText } from "../loadPlan.ts";
import { asWritten } from "../options.ts";
import { printJson } from "../output.ts";

/** A text that an editor has, perhaps not saved, and its file. */
interface EditedJob {
  readonly text: string;
  readonly file: string;
}

/** The process of `requestMemoryFindings`: reads a job from stdin and prints its findings about memory as JSON. */
export async function printMemoryFindings(): Promise<void> {
  const { text, file } = (await json(process.stdin)) as EditedJob;
  const { findings } = await readJobText(text, file, asWritten);
  printJson(findings.filter(({ code }) => code === "C510"));
}

/** Starts the process for a job, and calls `found` with its findings. Returns a function that ends it. */
export function requestMemoryFindings(job: EditedJob, found: (findings: readonly Finding[]) => void): () => void {
  const [, script = ""] = process.argv;
  const child: ChildProcess = spawn(process.execPath, [...process.execArgv, script, "lsp", "--memory-findings"], {
    stdio: ["pipe", "pipe", "ignore"],
  });
  let isCancelled = false;
  let text = "";
  child.stdout?.setEncoding("utf8").on("data", (chunk: string) => {
    text += chunk;
  });
  // without the process the job has one finding less until the next edit
  child.on("error", () => {});
  child.stdin?.on("error", () => {});
  child.on("close", (code) => {
    if (code === 0 && !isCancelled) found(JSON.parse(text) as Finding[]);
  });
  child.stdin?.end(JSON.stringify(job));
  return () => {
    isCancelled = true;
    child.kill();
  };
}
