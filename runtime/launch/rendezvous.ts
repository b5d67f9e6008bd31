/**
 * The rendezvous of all ranks of a run, one process each. `join` returns when all ranks are connected and run the same plan with the same
 * rankc. They then share bytes (NCCL ids), synchronize at barriers, and stop after the same step. If a rank is lost, hangs or fails, all
 * others abort.
 */
import { MessageChannel, receiveMessageOnPort } from "node:worker_threads";
import { Trouble } from "../../schemas/trouble.ts";
import type { Env } from "./place.ts";
import { cells, startWatchdog, unknown, type WatchdogCommand, type WatchdogMessage } from "./watchdog.ts";

/** Settings of `join`. */
export interface JoinSettings {
  readonly rank: number;
  readonly world: number;
  readonly address: string;
  readonly port: number;
  readonly token: string;
  /** The digest of the plan, and the version of rankc: the same on all ranks. */
  readonly plan: string;
  readonly version: string;
  readonly times: Times;
  /** The process id of the launcher, if one started this rank: when it ends, the rank aborts. */
  readonly launcher?: number;
  /** Called when another rank aborts the run. Pending calls reject with the same error. The process has six seconds to end. */
  readonly onAbort?: (reason: Trouble) => void;
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
  /** Waits until all ranks have reached the barrier of this name. */
  barrier(name: string): Promise<void>;
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
  const milliseconds = Object.fromEntries(Object.entries(times).map(([name, s]) => [name, s * 1000])) as unknown as Times;
  const shared = new SharedArrayBuffer(4 * Object.keys(cells).length);
  const cell = new Int32Array(shared);
  cell[cells.last] = unknown;
  const { port1: port, port2 } = new MessageChannel();
  const watchdog = startWatchdog({ ...who, ...milliseconds, launcher }, port2, shared);
  watchdog.unref();

  const texts = new Map([["", 0]]);
  const waiting = new Map<string, Waiting[]>();
  const arrived = new Map<string, WatchdogMessage[]>();
  let over: Trouble | undefined;
  let left = false;

  /** Returns the next message of this kind and name. A pending wait keeps the process alive. */
  function next<K extends WatchdogMessage["kind"]>(kind: K, name = ""): Promise<Extract<WatchdogMessage, { kind: K }>> {
    if (over) return Promise.reject(over);
    const key = `${kind} ${name}`;
    const there = arrived.get(key)?.shift();
    if (there) return Promise.resolve(there as Extract<WatchdogMessage, { kind: K }>);
    port.ref();
    return new Promise((resolve, reject) => {
      const mine: Waiting = { resolve: resolve as Waiting["resolve"], reject };
      waiting.set(key, [...(waiting.get(key) ?? []), mine]);
    });
  }
  function rest(): void {
    if ([...waiting.values()].every((all) => all.length === 0)) port.unref();
  }
  function end(reason: Trouble): void {
    if (over || left) return;
    over = reason;
    const all = [...waiting.values()].flat();
    waiting.clear();
    rest();
    for (const { reject } of all) reject(reason);
  }
  function onMessage(message: WatchdogMessage): void {
    if (message.kind === "abort") {
      Atomics.store(cell, cells.over, 2);
      end(new Trouble(message.text));
      onAbort?.(over!);
      return;
    }
    if (message.kind === "refused") {
      end(new Trouble(message.text, message.fix));
      return;
    }
    const key = `${message.kind} ${"name" in message ? message.name : ""}`;
    const first = waiting.get(key)?.shift();
    if (first) first.resolve(message);
    else arrived.set(key, [...(arrived.get(key) ?? []), message]);
    rest();
  }
  const receiveNow = (): void => {
    for (let got = receiveMessageOnPort(port); got; got = receiveMessageOnPort(port)) onMessage(got.message as WatchdogMessage);
  };
  const order = (given: WatchdogCommand): void => port.postMessage(given);

  port.on("message", onMessage);
  port.unref();
  watchdog.on("error", (error) => {
    end(error as Trouble);
    onAbort?.(error as Trouble);
  });
  await next("welcome");

  const everybody = Array.from({ length: who.world }, (_, r) => r);
  async function share(name: string, members: readonly number[], make: () => Uint8Array): Promise<Uint8Array> {
    if (!members.includes(who.rank)) throw new Error(`rank ${who.rank} is no member of ${name}: ${members}`);
    if (over) throw over;
    if (members[0] !== who.rank) {
      const message = await next("shared", name);
      if (`${message.members}` !== `${members}`)
        throw new Error(`${name} was shared with ${message.members}; rank ${who.rank} expects ${members}`);
      return message.data;
    }
    const data = make();
    if (data.length > 2 ** 20) throw new Error(`${name} has ${data.length} bytes: more than a message takes`);
    if (members.length > 1) order({ kind: "share", name, members, data });
    return data;
  }
  async function leave(how: WatchdogCommand): Promise<void> {
    if (left || over) return;
    order(how);
    await next("bye");
    left = true;
    // the watchdog ends when its last message has arrived
    port.close();
  }

  return {
    share,
    broadcast: (name, bytes) =>
      share(name, everybody, () => {
        if (bytes) return bytes;
        throw new Error(`rank 0 must give the bytes of ${name}`);
      }),
    async barrier(name) {
      if (over) throw over;
      order({ kind: "barrier", name });
      await next("released", name);
    },
    begin(step) {
      Atomics.store(cell, cells.step, step);
      Atomics.store(cell, cells.text, 0);
      Atomics.add(cell, cells.reports, 1);
      if (Atomics.load(cell, cells.hold) === 1) Atomics.wait(cell, cells.last, unknown);
      if (Atomics.load(cell, cells.over) !== 0) receiveNow();
      if (over) throw over;
      const last = Atomics.load(cell, cells.last);
      return last === unknown || step <= last;
    },
    report(instruction) {
      let index = texts.get(instruction);
      if (index === undefined) {
        texts.set(instruction, (index = texts.size));
        order({ kind: "text", index, text: instruction });
      }
      Atomics.store(cell, cells.text, index);
      Atomics.add(cell, cells.reports, 1);
    },
    stop: () => order({ kind: "stop" }),
    async fail(reason) {
      // ignore the abort that this rank caused; a lost hub does not answer
      await Promise.race([leave({ kind: "fail", text: reason }), new Promise((r) => setTimeout(r, 1000).unref())]).catch(() => {});
    },
    close: () => leave({ kind: "bye" }),
  };
}

interface Waiting {
  readonly resolve: (message: WatchdogMessage) => void;
  readonly reject: (reason: Trouble) => void;
}
