/**
 * The watchdog: a thread of each rank that holds its line to the others, for NCCL and CUDA block the main thread for as long as they
 * like. When the run is over, the main thread is told; where it is blocked and cannot hear, the watchdog says why and ends the process.
 * That is the one place beside the command line that prints and ends a process: nobody else is awake.
 */
import { writeSync } from "node:fs";
import { type MessagePort, Worker, workerData } from "node:worker_threads";
import { escaped, printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { type Hub, type HubSettings, openHub } from "./hub.ts";
import { connectPeer, type PeerConnection, type PeerSettings } from "./peer.ts";

/** Cells of what both threads see, all i32. */
export const cells = {
  /** Counts what the main thread reports: it moves on. */
  reports: 0,
  /** The last step it has begun. */
  step: 1,
  /** The number of the text that says where it is. */
  text: 2,
  /** 1: begin no step before `last` is known. */
  hold: 3,
  /** The last step to run; `unknown` until the ranks have agreed. */
  last: 4,
  /** 1: the run is over. 2: and the main thread knows. */
  over: 5,
} as const;
export const unknown = -2;

export interface WatchdogSettings extends HubSettings, PeerSettings {
  /** How long a main thread that does not hear is waited for; one that hears has three times as long. Milliseconds. */
  readonly grace: number;
  /** The process that must stay this one's parent. */
  readonly launcher: number | undefined;
}

/** From the main thread to the watchdog. */
export type WatchdogCommand =
  | { readonly kind: "text"; readonly index: number; readonly text: string }
  | { readonly kind: "share"; readonly name: string; readonly members: readonly number[]; readonly data: Uint8Array }
  | { readonly kind: "barrier"; readonly name: string }
  | { readonly kind: "fail"; readonly text: string }
  | { readonly kind: "stop" }
  | { readonly kind: "bye" };

/** From the watchdog to the main thread. */
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

/** Starts the thread. From a checkout, where this file is TypeScript, the thread needs the loader that the process itself runs under. */
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
  const say = (message: WatchdogMessage): void => port.postMessage(message);
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
    say({ kind: "abort", text });
    const kill = (): void => {
      const { step, text: at } = where();
      try {
        writeSync(2, `rankc: rank ${settings.rank} stops${at && ` in step ${step}, ${printable(at)}`}: ${escaped(text)}\n`);
      } catch {
        // nobody reads what we say: it ends all the same
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
    say({ kind: "refused", text: message, fix });
    return port.close();
  }
  member = connectPeer(settings, () => ({ kind: "beat", reports: Atomics.load(cell, cells.reports), ...where() }), {
    welcome: () => say({ kind: "welcome" }),
    refused: (text, fix) => {
      say({ kind: "refused", text, fix });
      close();
    },
    shared: (name, members, data) => say({ kind: "shared", name, members, data }),
    released: (name) => say({ kind: "released", name }),
    abort,
    // the flag first, then the step: either the main thread sees the flag before it begins another, or we see that other
    hold: () => {
      Atomics.store(cell, cells.hold, 1);
      member!.send({ kind: "begun", step: Atomics.load(cell, cells.step) });
    },
    last: settle,
    bye: () => {
      say({ kind: "bye" });
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
