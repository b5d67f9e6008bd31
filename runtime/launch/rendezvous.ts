/**
 * The rendezvous of all ranks of a run, one process each. `join` returns when all ranks are connected and run the same plan with the same
 * rankc. They then share bytes (NCCL ids), synchronize at barriers, and stop after the same step. If a rank is lost, hangs or fails, all
 * others abort.
 */
import { MessageChannel, type MessagePort, receiveMessageOnPort } from "node:worker_threads";
import { Trouble } from "../../schemas/trouble.ts";
import { Inbox } from "./inbox.ts";
import type { Membership } from "./peer.ts";
import type { Env } from "./rankPlace.ts";
import { cells, startWatchdog, unknown, type WatchdogCommand, type WatchdogMessage } from "./watchdog.ts";

/** Settings of `join`. */
export interface JoinSettings extends Membership {
  readonly times: Times;
  /** The process id of the launcher, if one started this rank: when it ends, the rank aborts. */
  readonly launcher?: number;
  /** Called when another rank aborts the run. Pending calls reject with the same error. The process has six seconds to end. */
  readonly onAbort?: (reason: Error) => void;
}

/** Time limits in seconds. */
export interface Times {
  /** For all ranks to connect. */
  readonly timeout: number;
  /** For one instruction of a rank. */
  readonly hang: number;
  readonly beat: number;
  /** Without a message from a rank. */
  readonly lost: number;
  readonly grace: number;
}

/** The connection to the other ranks of the run. */
export interface Meeting {
  /** Sends bytes from rank 0 to all others. A name may be reused: the n-th call receives the bytes of the n-th call. */
  broadcast(name: string, bytes: Uint8Array | undefined): Promise<Uint8Array>;
  /** Sends bytes from the first member of a group to the others. At most 1 MiB. */
  share(name: string, members: readonly number[], make: () => Uint8Array): Promise<Uint8Array>;
  /** Waits until all ranks have reached the barrier of this name. Returns the first `problem` that a rank stated there, with its rank. */
  barrier(name: string, problem?: string): Promise<string | undefined>;
  /** Reports the begin of a step (from 1). Returns false if the ranks have agreed to stop before it. Throws if the run is aborted. */
  begin(step: number): boolean;
  /** Reports the current instruction. Costs two stores, and a message for a new text. */
  report(instruction: string): void;
  /** Requests that all ranks stop after the same step: the last that any rank has begun. */
  stop(): void;
  /** Aborts the run on all other ranks, and leaves. */
  fail(reason: string): Promise<void>;
  /** Leaves the run. Rank 0 waits until all others have left. */
  close(): Promise<void>;
}

const defaults: Times = { timeout: 300, hang: 600, beat: 2, lost: 15, grace: 2 };

/** Returns the time limits, with RANKC_TIMEOUT and RANKC_HANG (seconds) from the environment. Throws a Trouble if a value is invalid. */
export function timesOf(env: Env): Times {
  return { ...defaults, timeout: secondsOf(env, "RANKC_TIMEOUT") ?? defaults.timeout, hang: secondsOf(env, "RANKC_HANG") ?? defaults.hang };
}

/** Returns the launcher's process id from the environment, for `join`. */
export const launcherOf = (env: Env): { readonly launcher?: number } =>
  env.RANKC_LAUNCHER ? { launcher: Number(env.RANKC_LAUNCHER) } : {};

function secondsOf(env: Env, name: string): number | undefined {
  const text = env[name];
  if (!text) return undefined;
  const value = Number(text);
  if (!(value > 0 && value <= 1e6))
    throw new Trouble(`${name} is ${JSON.stringify(text)}, not a number of seconds`, `set ${name}=600, or unset it`);
  return value;
}

/** Joins the run. Throws a Trouble that names missing ranks, or ranks with another plan or version. */
export async function join({ times, launcher, onAbort, ...who }: JoinSettings): Promise<Meeting> {
  const shared = new SharedArrayBuffer(4 * Object.keys(cells).length);
  const cell = new Int32Array(shared);
  cell[cells.last] = unknown;
  const { port1, port2 } = new MessageChannel();
  const watchdog = startWatchdog({ ...who, ...inMilliseconds(times), launcher }, port2, shared);
  watchdog.unref();
  const meeting = new WatchedMeeting(who, cell, port1, onAbort);
  watchdog.on("error", (error: Error) => meeting.abort(error));
  await meeting.welcomed();
  return meeting;
}

const inMilliseconds = ({ timeout, hang, beat, lost, grace }: Times): Times => ({
  ...{ timeout: timeout * 1000, hang: hang * 1000, beat: beat * 1000, lost: lost * 1000, grace: grace * 1000 },
});

type Message<K extends WatchdogMessage["kind"]> = Extract<WatchdogMessage, { kind: K }>;

/** A meeting whose connection is held by the watchdog thread behind `port`. Both threads share the cells. */
class WatchedMeeting implements Meeting {
  readonly #who: Membership;
  readonly #cell: Int32Array<SharedArrayBuffer>;
  readonly #port: MessagePort;
  readonly #onAbort: JoinSettings["onAbort"];
  readonly #welcome = new Inbox<Message<"welcome">>();
  readonly #shared = new Inbox<Message<"shared">>();
  readonly #released = new Inbox<Message<"released">>();
  readonly #bye = new Inbox<Message<"bye">>();
  readonly #inboxes = [this.#welcome, this.#shared, this.#released, this.#bye];
  /** Indices of the texts that the watchdog knows. */
  readonly #texts = new Map([["", 0]]);
  #over: Error | undefined;
  #left = false;
  /** Whether this rank has asked to stop. */
  #isStopping = false;

  constructor(who: Membership, cell: Int32Array<SharedArrayBuffer>, port: MessagePort, onAbort: JoinSettings["onAbort"]) {
    this.#who = who;
    this.#cell = cell;
    this.#port = port;
    this.#onAbort = onAbort;
    port.on("message", (message: WatchdogMessage) => this.#receive(message));
    port.unref();
  }

  /** Waits until all ranks are connected. */
  async welcomed(): Promise<void> {
    await this.#next(this.#welcome);
  }

  /** Ends the meeting with an error, and calls `onAbort`. */
  abort(reason: Error): void {
    this.#end(reason);
    this.#onAbort?.(this.#over ?? reason);
  }

  async share(name: string, members: readonly number[], make: () => Uint8Array): Promise<Uint8Array> {
    const { rank } = this.#who;
    if (!members.includes(rank)) throw new Error(`rank ${rank} is no member of ${name}: ${members}`);
    if (this.#over) throw this.#over;
    if (members[0] !== rank) {
      const message = await this.#next(this.#shared, name);
      if (`${message.members}` !== `${members}`)
        throw new Error(`${name} was shared with ${message.members}; rank ${rank} expects ${members}`);
      return message.data;
    }
    const data = make();
    if (data.length > 2 ** 20) throw new Error(`${name} has ${data.length} bytes: more than the limit of a message`);
    if (members.length > 1) this.#command({ kind: "share", name, members, data });
    return data;
  }

  broadcast(name: string, bytes: Uint8Array | undefined): Promise<Uint8Array> {
    const everybody = Array.from({ length: this.#who.world }, (_, r) => r);
    return this.share(name, everybody, () => {
      if (bytes) return bytes;
      throw new Error(`rank 0 must give the bytes of ${name}`);
    });
  }

  async barrier(name: string, problem?: string): Promise<string | undefined> {
    if (this.#over) throw this.#over;
    this.#command({ kind: "barrier", name, ...(problem !== undefined && { problem: problem.slice(0, 4000) }) });
    return (await this.#next(this.#released, name)).problem;
  }

  begin(step: number): boolean {
    const cell = this.#cell;
    // a rank that has asked to stop begins no further step before the ranks agree: its last step is then the last of all, if none is ahead of it
    if (this.#isStopping) Atomics.wait(cell, cells.last, unknown);
    Atomics.store(cell, cells.step, step);
    Atomics.store(cell, cells.text, 0);
    Atomics.add(cell, cells.reports, 1);
    if (Atomics.load(cell, cells.hold) === 1) Atomics.wait(cell, cells.last, unknown);
    if (Atomics.load(cell, cells.over) !== 0) this.#receivePending();
    if (this.#over) throw this.#over;
    const last = Atomics.load(cell, cells.last);
    return last === unknown || step <= last;
  }

  report(instruction: string): void {
    let index = this.#texts.get(instruction);
    if (index === undefined) {
      this.#texts.set(instruction, (index = this.#texts.size));
      this.#command({ kind: "text", index, text: instruction });
    }
    Atomics.store(this.#cell, cells.text, index);
    Atomics.add(this.#cell, cells.reports, 1);
  }

  stop(): void {
    this.#isStopping = true;
    this.#command({ kind: "stop" });
  }

  async fail(reason: string): Promise<void> {
    // ignore the abort that this rank caused; a lost hub does not answer
    await Promise.race([this.#leave({ kind: "fail", text: reason }), new Promise((r) => setTimeout(r, 1000).unref())]).catch(() => {});
  }

  close(): Promise<void> {
    return this.#leave({ kind: "bye" });
  }

  async #leave(how: WatchdogCommand): Promise<void> {
    if (this.#left || this.#over) return;
    this.#command(how);
    await this.#next(this.#bye);
    this.#left = true;
    // the watchdog ends when its last message has arrived
    this.#port.close();
  }

  #command(command: WatchdogCommand): void {
    this.#port.postMessage(command);
  }

  /** Returns the next message of an inbox. A pending wait keeps the process alive. */
  #next<T extends object>(inbox: Inbox<T>, name?: string): Promise<T> {
    if (this.#over) return Promise.reject(this.#over);
    const message = inbox.next(name);
    this.#holdProcess();
    return message;
  }

  #holdProcess(): void {
    if (this.#inboxes.some((inbox) => inbox.isAwaited)) this.#port.ref();
    else this.#port.unref();
  }

  #receivePending(): void {
    for (let got = receiveMessageOnPort(this.#port); got; got = receiveMessageOnPort(this.#port)) this.#receive(got.message);
  }

  #receive(message: WatchdogMessage): void {
    switch (message.kind) {
      case "abort":
        Atomics.store(this.#cell, cells.over, 2);
        this.abort(new Trouble(message.text));
        break;
      case "refused":
        this.#end(new Trouble(message.text, message.fix));
        break;
      case "welcome":
        this.#welcome.add(message);
        break;
      case "shared":
        this.#shared.add(message, message.name);
        break;
      case "released":
        this.#released.add(message, message.name);
        break;
      case "bye":
        this.#bye.add(message);
        break;
      default:
        message satisfies never;
    }
    this.#holdProcess();
  }

  #end(reason: Error): void {
    if (this.#over || this.#left) return;
    this.#over = reason;
    for (const inbox of this.#inboxes) inbox.reject(reason);
    this.#holdProcess();
  }
}
