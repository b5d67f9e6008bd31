import type { Command } from "commander";
import { dataDirOf, loadPlan, planFile } from "./loadPlan.ts";
import { type CommonOptions, dataDirHelp, planOrJob, wholeNumber, withExamples, withSet, withTarget } from "./options.ts";
import { printStderr, printStdout } from "./output.ts";

/** Registers `serve`: serves the browser page on 127.0.0.1 until the process is interrupted. */
export function registerServe(program: Command): void {
  withExamples(
    withTarget(withSet(program.command("serve").description("serve a page on 127.0.0.1 that trains a plan in the browser with WebGPU")))
      .argument("<plan|job>", planOrJob)
      .option("--port <port>", "the port on 127.0.0.1; 0 selects a free port", wholeNumber, 8080)
      .option("--data-dir <dir>", dataDirHelp),
    "serve job.yaml",
    "serve plan/ --data-dir . --port 0",
  ).action(async (path: string, options: Pick<CommonOptions, "set"> & { target?: string; port: number; dataDir?: string }) => {
    const { serve } = await import("./pageServer.ts");
    const loaded = await loadPlan(path, options.set, options.target ?? (planFile(path) ? undefined : "webgpu"));
    const { address, close } = await serve(loaded, { port: options.port, baseDir: options.dataDir ?? dataDirOf(path) });
    printStdout(address);
    printStderr("open it in a browser with WebGPU; Ctrl-C ends it");
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => void close());
  });
}
