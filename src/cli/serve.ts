import type { Command } from "commander";
import { Trouble } from "../../schemas/trouble.ts";
import { dataDirOf, loadPlan, planFile } from "./loadPlan.ts";
import { collect, dataDirHelp, type JobOptions, planOrJob, wholeNumber, withExamples, withSet, withTarget } from "./options.ts";
import { printStderr, printStdout } from "./output.ts";

interface ServeOptions extends JobOptions {
  readonly target?: string;
  readonly port: number;
  readonly dataDir?: string;
  readonly log: readonly string[];
}

/** Registers `serve`: serves the browser page on 127.0.0.1 until the process is interrupted. */
export function registerServe(program: Command): void {
  withExamples(
    withTarget(withSet(program.command("serve").description("serve a page on 127.0.0.1 that trains a plan in the browser with WebGPU")))
      .argument("[plan|job]", planOrJob)
      .option("--log <dir>", "show the log of rankc run --log, or of several runs over each other (repeatable)", collect, [])
      .option("--port <port>", "the port on 127.0.0.1; 0 selects a free port", wholeNumber, 8080)
      .option("--data-dir <dir>", dataDirHelp),
    "serve job.yaml",
    "serve plan/ --data-dir . --port 0",
    "serve --log logs/first --log logs/second",
  ).action(async (path: string | undefined, options: ServeOptions) => {
    const { serve, serveLogs } = await import("./pageServer.ts");
    if (options.log.length > 0) {
      if (path !== undefined) throw new Trouble(`${path} is served or the logs, not both`, "start rankc serve for each");
      const { address, close } = await serveLogs(options.log, options);
      printStdout(address);
      printStderr("open it in a browser; Ctrl-C ends it");
      for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => void close());
      return;
    }
    if (path === undefined) throw new Trouble("nothing is named to serve", "name a plan or a job, or a log: --log DIR");
    const loaded = await loadPlan(path, options, options.target ?? (planFile(path) ? undefined : "webgpu"));
    const { address, close } = await serve(loaded, { port: options.port, baseDir: options.dataDir ?? dataDirOf(path) });
    printStdout(address);
    printStderr("open it in a browser with WebGPU; Ctrl-C ends it");
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => void close());
  });
}
