/**
 * The watchdog: a thread of each rank that owns its connection to the hub, because NCCL and CUDA may block the main thread indefinitely.
 * When the run is aborted, it notifies the main thread; if that is blocked, the watchdog prints the reason and kills the process. It is
 * the only code besides the command line that does so.
 */
import { writeSync } from "node:fs";
import { type MessagePort, Worker, workerData } from "node:worker_threads";
import { escaped, printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { type Hub, type HubSettings, openHub } from "./hub.ts";
import { connectPeer, type PeerConnection, type PeerSettings } from "./peer.ts";

/** Indices of the i32 cells that both threads share. */
export const cells = {
  /** Counter of the main thread's reports; it increases while the thread makes progress. */
  reports: 0,
  /** The last step that the main thread has begun. */
  step: 1,
  /** The index of the text of the current instruction. */
  text: 2,
  /** 1: the main thread begins no step before `last` is set. */
  hold: 3,
  /** The last step to run; `unknown` until all ranks agree. */
  last: 4,
  /** 1: the run is aborted. 2: the main thread has received the abort. */
  over: 5,
} as const;
/** Value of the cell `last` before all ranks agree. */
export const unknown = -2;

/** Settings of the watchdog thread. */
export interface WatchdogSettings extends HubSettings, PeerSettings {
  /** Milliseconds from an abort to the kill of a blocked main thread; a main thread that has received the abort gets three times as long. */
  readonly grace: number;
  /** The process id of the launcher; if it is no longer the parent, the rank aborts. */
  readonly launcher: number | undefined;
}

/** A message from the main thread to the watchdog. */
export type WatchdogCommand =
  | { readonly kind: "text"; readonly index: number; readonly text: string }
  | { readonly kind: "share"; readonly name: string; readonly members: readonly number[]; readonly data: Uint8Array }
  | { readonly kind: "barrier"; readonly name: string }
  | { readonly kind: "fail"; readonly text: string }
  | { readonly kind: "stop" }
  | { readonly kind: "bye" };

/** A message from the watchdog to the main thread. */
export type WatchdogMessage =
  | { readonly kind: "welcome" }
  | { readonly kind: "refused"; readonly text: string; readonly fix: string }
  | { readonly kind: "shared"; readonly name: string; readonly members: readonly number[]; readonly data: Uint8Array }
  | { readonly kind: "released"; readonly name: string }
  | { readonly kind: "abort"; readonly text: string }
  | { readonly kind: "bye" };

interface Given {
  readonly watchdog: WatchdogSettings;
  readonly port: MessagePort;
  readonly shared: SharedArrayBuffer;
}

/** Starts the watchdog thread. In a checkout this file is TypeScript, and the thread registers the tsx loader first. */
export function startWatchdog(watchdog: WatchdogSettings, port: MessagePort, shared: SharedArrayBuffer): Worker {
  const here = import.meta.url;
  const given = { workerData: { watchdog, port, shared } satisfies Given, transferList: [port] };
  if (!here.endsWith(".ts")) return new Worker(new URL(here), given);
  const loader = import.meta.resolve("tsx/esm/api");
  const start = `import(${JSON.stringify(loader)}).then(({ register }) => (register(), import(${JSON.stringify(here)})))`;
  return new Worker(start, { ...given, eval: true });
}

async function serve({ watchdog: settings, port, shared }: Given): Promise<void> {
  const cell = new Int32Array(shared);
  const texts = [""];
  const post = (message: WatchdogMessage): void => port.postMessage(message);
  let hub: Hub | undefined;
  let member: PeerConnection | undefined;
  let parent: NodeJS.Timeout | undefined;

  const where = () => ({ step: Atomics.load(cell, cells.step), text: texts[Atomics.load(cell, cells.text)] ?? "" });
  const settle = (step: number): void => {
    Atomics.store(cell, cells.last, step);
    Atomics.notify(cell, cells.last);
  };
  const close = (): void => {
    clearInterval(parent);
    member?.close();
    hub?.close();
    port.close();
  };
  const abort = (text: string): void => {
    if (Atomics.compareExchange(cell, cells.over, 0, 1) !== 0) return;
    clearInterval(parent);
    settle(-1);
    post({ kind: "abort", text });
    const kill = (): void => {
      const { step, text: at } = where();
      try {
        writeSync(2, `rankc: rank ${settings.rank} stops${at && ` in step ${step}, ${printable(at)}`}: ${escaped(text)}\n`);
      } catch {
        // stderr is closed; kill the process anyway
      }
      process.kill(process.pid, "SIGKILL");
    };
    setTimeout(() => (Atomics.load(cell, cells.over) === 2 ? setTimeout(kill, 2 * settings.grace) : kill()), settings.grace);
  };

  try {
    if (settings.rank === 0) hub = await openHub(settings);
  } catch (error) {
    const { message, fix = "" } = error as Trouble;
    if (!(error instanceof Trouble)) throw error;
    post({ kind: "refused", text: message, fix });
    return port.close();
  }
  member = connectPeer(settings, () => ({ kind: "beat", reports: Atomics.load(cell, cells.reports), ...where() }), {
    welcome: () => post({ kind: "welcome" }),
    refused: (text, fix) => {
      post({ kind: "refused", text, fix });
      close();
    },
    shared: (name, members, data) => post({ kind: "shared", name, members, data }),
    released: (name) => post({ kind: "released", name }),
    abort,
    // set the flag before the step is read: the main thread sees the flag before its next step, or that step is read here
    hold: () => {
      Atomics.store(cell, cells.hold, 1);
      member!.send({ kind: "begun", step: Atomics.load(cell, cells.step) });
    },
    last: settle,
    bye: () => {
      post({ kind: "bye" });
      close();
    },
  });
  const line = member;
  const orders: { [K in WatchdogCommand["kind"]]: (order: Extract<WatchdogCommand, { kind: K }>) => void } = {
    text: ({ index, text }) => void (texts[index] = text.slice(0, 1000)),
    share: ({ name, members, data }) => line.send({ kind: "share", name, members: [...members] }, data),
    barrier: ({ name }) => line.send({ kind: "barrier", name }),
    fail: ({ text }) => {
      const { step, text: at } = where();
      line.send({ kind: "fail", text: text.slice(0, 4000), step, at });
    },
    stop: () => line.send({ kind: "stop" }),
    bye: () => line.send({ kind: "bye" }),
  };
  port.on("message", (order: WatchdogCommand) => orders[order.kind](order as never));
  if (settings.launcher !== undefined)
    parent = setInterval(() => {
      if (process.ppid !== settings.launcher) abort("the process that started it is gone");
    }, settings.beat);
}

if ((workerData as Partial<Given> | null)?.watchdog) await serve(workerData as Given);
