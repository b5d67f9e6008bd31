/**
 * Processes that compile sources with NVRTC, one on each core: calls of NVRTC in threads of Node share four threads, and leave their memory
 * behind in the process of the rank.
 */
import { type ChildProcess, fork } from "node:child_process";
import { fileURLToPath } from "node:url";
import { Trouble } from "../../schemas/trouble.ts";
import { loaderOptions, moduleUrl } from "../moduleUrl.ts";
import { type CompileOptions, compile } from "./nvrtc.ts";

interface Question {
  readonly source: string;
  readonly options: CompileOptions;
}
type Answer =
  | { readonly image: Uint8Array }
  | { readonly trouble: { readonly message: string; readonly fix: string | undefined; readonly exit: Trouble["exit"] } }
  | { readonly failed: string };

/** Compiles sources in other processes. */
export interface CompilePool {
  /** Compiles a source; waits for a free process. Rejects as `compile` of nvrtc.ts throws. */
  readonly compile: (source: string, options: CompileOptions) => Promise<Uint8Array>;
  /** Ends the processes. */
  readonly close: () => void;
}

/** The argument that makes this file a compiling process. */
const ROLE = "compile-with-nvrtc";

/** Opens a pool of up to `most` processes; one starts when a source waits and none is free. */
export function openCompilePool(most: number): CompilePool {
  const free: Compiler[] = [];
  const all: Compiler[] = [];
  const waiting: (() => void)[] = [];
  const release = (): void => waiting.shift()?.();
  return {
    async compile(source, options) {
      let own = free.pop();
      if (!own && all.length < most) all.push((own = new Compiler()));
      while (!own) {
        await new Promise<void>((resolve) => waiting.push(resolve));
        own = free.pop();
      }
      try {
        return await own.compile({ source, options });
      } finally {
        free.push(own);
        release();
      }
    },
    close: () => {
      for (const { child } of all) if (child.connected) child.disconnect();
    },
  };
}

class Compiler {
  readonly child: ChildProcess;
  #ended: string | undefined;

  constructor() {
    const url = moduleUrl("cuda/compilePool", import.meta.url);
    // the options of this process are not inherited: they may belong to a program around it, such as a test runner
    this.child = fork(fileURLToPath(url), [ROLE], { serialization: "advanced", execArgv: loaderOptions(url) });
    this.child.on("error", (error) => {
      this.#ended = error.message;
    });
    // a pool that is not closed must not keep the run alive
    this.child.unref();
    this.child.channel?.unref();
  }

  compile(question: Question): Promise<Uint8Array> {
    const { child } = this;
    return new Promise((resolve, reject) => {
      const done = (): void => {
        child.channel?.unref();
        child.off("message", onAnswer).off("exit", onExit);
      };
      const onAnswer = (answer: Answer): void => {
        done();
        if ("image" in answer) resolve(answer.image);
        else if ("trouble" in answer) reject(new Trouble(answer.trouble.message, answer.trouble.fix, answer.trouble.exit));
        else reject(new Error(answer.failed));
      };
      const onExit = (code: number | null, signal: string | null): void => {
        done();
        reject(new Error(`the process that compiles ${question.options.name} ended (${signal ?? `exit code ${code}`})`));
      };
      child.channel?.ref();
      child.on("message", onAnswer).on("exit", onExit);
      if (this.#ended !== undefined || !child.connected) onExit(child.exitCode, this.#ended ?? child.signalCode);
      else child.send(question, (error) => error && onExit(child.exitCode, error.message));
    });
  }
}

function answerTo({ source, options }: Question): Answer {
  try {
    return { image: compile(source, options) };
  } catch (error) {
    if (error instanceof Trouble) return { trouble: { message: error.message, fix: error.fix, exit: error.exit } };
    return { failed: error instanceof Error ? error.message : String(error) };
  }
}

if (process.send && process.argv[2] === ROLE) {
  process.on("message", (question: Question) => process.send?.(answerTo(question)));
}
