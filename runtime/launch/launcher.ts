/**
 * The launcher: starts one process per rank on this host, and returns when all have ended. It forwards their output line by line and
 * signals to all of them. If one rank fails, it ends the others.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:net";
import { constants } from "node:os";
import { createInterface } from "node:readline";
import { Trouble } from "../../schemas/trouble.ts";
import { type Cancel, type Clock, systemClock } from "./clock.ts";
import type { Env } from "./rankPlace.ts";

/** Settings of `launch`. */
export interface LaunchSettings {
  readonly command: string;
  readonly args: readonly string[];
  readonly ranks: number;
  readonly env: Env;
  /** Receives a line of output, without its line feed. Lines that rank 0 prints to stdout are data and unchanged; all others begin with the rank: `[3] …`. */
  readonly onLine: (stream: "stdout" | "stderr", line: string) => void;
  /** Milliseconds from the first failure to SIGTERM, in which the other ranks end with their own messages (`settle`); then to SIGKILL (`grace`). */
  readonly settle?: number;
  readonly grace?: number;
  /** Default: the system clock. */
  readonly clock?: Clock;
}

/** The result of `launch`. */
export interface Launched {
  /** The exit code of the first rank that failed, 128 + n after signal n; 0 if all succeeded. */
  readonly code: number;
  readonly failed?: { readonly rank: number; readonly how: string };
  /** The signal that the launcher received, if any. */
  readonly signal?: "SIGINT" | "SIGTERM" | "SIGUSR1" | "SIGHUP";
}

/** Starts the ranks and waits for them. Each rank selects its GPU by LOCAL_RANK. Throws a Trouble if the command does not start. */
export async function launch(settings: LaunchSettings): Promise<Launched> {
  const { command, args, ranks, env, onLine, settle = 3000, grace = 5000, clock = systemClock } = settings;
  const port = await freePort();
  const shared = {
    ...env,
    WORLD_SIZE: `${ranks}`,
    LOCAL_WORLD_SIZE: `${ranks}`,
    MASTER_ADDR: "127.0.0.1",
    MASTER_PORT: `${port}`,
    RANKC_TOKEN: randomBytes(32).toString("hex"),
    RANKC_LAUNCHER: `${process.pid}`,
    // NVLink multicast stays off
    NCCL_NVLS_ENABLE: "0",
  };
  // these variables describe the launcher's own process, not its ranks
  for (const name of ["RANKC_PORT", "TORCHELASTIC_USE_AGENT_STORE"]) delete (shared as Record<string, string | undefined>)[name];

  let failed: { rank: number; how: string; code: number } | undefined;
  let signal: Launched["signal"];
  const timers: Cancel[] = [];
  const width = `${ranks - 1}`.length;
  const children = Array.from({ length: ranks }, (_, rank) =>
    // a separate session: signals of the terminal reach only the launcher, which forwards them
    spawn(command, args, {
      env: { ...shared, RANK: `${rank}`, LOCAL_RANK: `${rank}` },
      stdio: ["ignore", "pipe", "pipe"],
      detached: true,
    }),
  );
  const running = new Set(children);
  const kill = (how: NodeJS.Signals): void => {
    for (const child of running) child.kill(how);
  };
  const after = (ms: number, act: () => void): void => void timers.push(clock.after(ms, act));
  const stop = (): void => {
    kill("SIGTERM");
    after(grace, () => kill("SIGKILL"));
  };
  const fail = (rank: number, how: string, code: number): void => {
    if (failed) return;
    failed = { rank, how, code };
    after(settle, stop);
  };

  const pass = (which: NonNullable<Launched["signal"]>) => (): void => {
    // the first signal lets the ranks finish their step and save, the second ends them
    if (which !== "SIGHUP" && signal === undefined) kill(which);
    else stop();
    signal ??= which;
  };
  const handlers = (["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"] as const).map((which) => [which, pass(which)] as const);
  for (const [which, handler] of handlers) process.on(which, handler);
  try {
    await Promise.all(
      children.map(async (child, rank) => {
        const prefix = `[${`${rank}`.padStart(width)}] `;
        const forwarded = [forward(child, "stdout", rank === 0 ? "" : prefix, onLine), forward(child, "stderr", prefix, onLine)];
        const { code, ended } = await endOf(child);
        running.delete(child);
        if (code !== 0) fail(rank, ended, code);
        // its pipes may outlive it in a process it has started: that is not waited for
        await Promise.race([Promise.all(forwarded), new Promise((r) => setTimeout(r, 500).unref())]);
      }),
    );
  } finally {
    for (const [which, handler] of handlers) process.removeListener(which, handler);
    for (const cancel of timers) cancel();
    kill("SIGKILL");
  }
  if (failed?.code === notStarted)
    throw new Trouble(`${command} could not be started: ${failed.how}`, "check that it exists and is executable");
  return {
    code: failed?.code ?? 0,
    ...(failed && { failed: { rank: failed.rank, how: failed.how } }),
    ...(signal && { signal }),
  };
}

const notStarted = -1;

function endOf(child: ChildProcess): Promise<{ code: number; ended: string }> {
  return new Promise((resolve) => {
    child.once("error", (error: NodeJS.ErrnoException) => resolve({ code: notStarted, ended: error.code ?? error.message }));
    child.once("exit", (code, signal) =>
      resolve(
        signal === null
          ? { code: code!, ended: `ended with exit code ${code}` }
          : { code: 128 + constants.signals[signal], ended: `was ended by ${signal}` },
      ),
    );
  });
}

/** Forwards lines until the stream ends. */
async function forward(child: ChildProcess, stream: "stdout" | "stderr", prefix: string, onLine: LaunchSettings["onLine"]): Promise<void> {
  const lines = createInterface({ input: child[stream]!, crlfDelay: Number.POSITIVE_INFINITY });
  lines.on("line", (text) => onLine(stream, prefix + text));
  await once(lines, "close");
}

/** Returns a free port on this host. */
export async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as { port: number };
  await new Promise((closed) => server.close(closed));
  return port;
}
