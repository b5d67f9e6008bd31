/**
 * The watchdog: a thread of each rank that owns its connection to the hub, because NCCL and CUDA may block the main thread indefinitely.
 * When the run is aborted, it notifies the main thread; if that is blocked, the watchdog prints the reason and kills the process. It is
 * the only code besides the command line that does so.
 */
import { writeSync } from "node:fs";
import { type MessagePort, type Worker, workerData } from "node:worker_threads";
import { escaped, printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { moduleUrl } from "../moduleUrl.ts";
import { startThread } from "../thread.ts";
import { type Cancel, systemClock } from "./clock.ts";
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
  | { readonly kind: "barrier"; readonly name: string; readonly problem?: string }
  | { readonly kind: "fail"; readonly text: string }
  | { readonly kind: "stop" }
  | { readonly kind: "bye" };

/** A message from the watchdog to the main thread. */
export type WatchdogMessage =
  | { readonly kind: "welcome" }
  | { readonly kind: "refused"; readonly text: string; readonly fix: string }
  | { readonly kind: "shared"; readonly name: string; readonly members: readonly number[]; readonly data: Uint8Array }
  | { readonly kind: "released"; readonly name: string; readonly problem?: string }
  | { readonly kind: "abort"; readonly text: string }
  | { readonly kind: "bye" };

interface Given {
  readonly watchdog: WatchdogSettings;
  readonly port: MessagePort;
  readonly shared: SharedArrayBuffer;
}

/** Starts the watchdog thread. */
export const startWatchdog = (watchdog: WatchdogSettings, port: MessagePort, shared: SharedArrayBuffer): Worker =>
  startThread(moduleUrl("launch/watchdog", import.meta.url), {
    workerData: { watchdog, port, shared } satisfies Given,
    transferList: [port],
  });

/** The thread: relays commands of the main thread and messages of the hub, and ends the process if an abort finds the main thread blocked. */
class Watchdog {
  readonly #settings: WatchdogSettings;
  readonly #port: MessagePort;
  readonly #cell: Int32Array<SharedArrayBuffer>;
  readonly #texts = new Map([[0, ""]]);
  readonly #hub: Hub | undefined;
  readonly #peer: PeerConnection;
  #cancelParentCheck: Cancel = () => {};

  constructor({ watchdog: settings, port, shared }: Given, hub: Hub | undefined) {
    this.#settings = settings;
    this.#port = port;
    this.#cell = new Int32Array(shared);
    this.#hub = hub;
    this.#peer = connectPeer(settings, () => ({ kind: "beat", reports: Atomics.load(this.#cell, cells.reports), ...this.#where() }), {
      welcome: () => this.#post({ kind: "welcome" }),
      refused: (text, fix) => {
        this.#post({ kind: "refused", text, fix });
        this.#close();
      },
      shared: (name, members, data) => this.#post({ kind: "shared", name, members, data }),
      released: (name, problem) => this.#post({ kind: "released", name, ...(problem !== undefined && { problem }) }),
      abort: (text) => this.#abort(text),
      hold: () => this.#hold(),
      last: (step) => this.#settle(step),
      bye: () => {
        this.#post({ kind: "bye" });
        this.#close();
      },
    });
    port.on("message", (command: WatchdogCommand) => this.#perform(command));
    const { launcher, beat } = settings;
    if (launcher === undefined) return;
    this.#cancelParentCheck = systemClock.every(beat, () => {
      if (process.ppid !== launcher) this.#abort("the process that started it has ended");
    });
  }

  #perform(command: WatchdogCommand): void {
    switch (command.kind) {
      case "text":
        this.#texts.set(command.index, command.text.slice(0, 1000));
        break;
      case "share":
        this.#peer.send({ kind: "share", name: command.name, members: [...command.members] }, command.data);
        break;
      case "fail": {
        const { step, text: at } = this.#where();
        this.#peer.send({ kind: "fail", text: command.text.slice(0, 4000), step, at });
        break;
      }
      case "barrier":
      case "stop":
      case "bye":
        this.#peer.send(command);
        break;
      default:
        command satisfies never;
    }
  }

  #post(message: WatchdogMessage): void {
    this.#port.postMessage(message);
  }

  #where(): { step: number; text: string } {
    return { step: Atomics.load(this.#cell, cells.step), text: this.#texts.get(Atomics.load(this.#cell, cells.text)) ?? "" };
  }

  #hold(): void {
    // set the flag before the step is read: the main thread sees the flag before its next step, or that step is read here
    Atomics.store(this.#cell, cells.hold, 1);
    this.#peer.send({ kind: "begun", step: Atomics.load(this.#cell, cells.step) });
  }

  #settle(step: number): void {
    Atomics.store(this.#cell, cells.last, step);
    Atomics.notify(this.#cell, cells.last);
  }

  #abort(text: string): void {
    if (Atomics.compareExchange(this.#cell, cells.over, 0, 1) !== 0) return;
    this.#cancelParentCheck();
    this.#settle(-1);
    this.#post({ kind: "abort", text });
    const { grace } = this.#settings;
    const kill = (): void => this.#kill(text);
    systemClock.after(grace, () => {
      if (Atomics.load(this.#cell, cells.over) === 2) systemClock.after(2 * grace, kill);
      else kill();
    });
  }

  #kill(text: string): void {
    const { step, text: at } = this.#where();
    try {
      writeSync(2, `rankc: rank ${this.#settings.rank} stops${at && ` in step ${step}, ${printable(at)}`}: ${escaped(text)}\n`);
    } catch {
      // stderr is closed; kill the process anyway
    }
    process.kill(process.pid, "SIGKILL");
  }

  #close(): void {
    this.#cancelParentCheck();
    this.#peer.close();
    this.#hub?.close();
    this.#port.close();
  }
}

/** Opens the hub on rank 0, then the watchdog. A hub that cannot be opened refuses this rank. */
async function serve(given: Given): Promise<void> {
  try {
    new Watchdog(given, given.watchdog.rank === 0 ? await openHub(given.watchdog) : undefined);
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    given.port.postMessage({ kind: "refused", text: error.message, fix: error.fix ?? "" } satisfies WatchdogMessage);
    given.port.close();
  }
}

if ((workerData as Partial<Given> | null)?.watchdog) void serve(workerData as Given);
