/** The connection of a peer to the hub of rank 0: connect with retry, handshake with the token, then messages and heartbeats. */
import { connect } from "node:net";
import { hostname } from "node:os";
import { type Cancel, type Clock, systemClock } from "./clock.ts";
import { type FramedConnection, framedConnection, limits, proofOf, type ToHub, ToRank } from "./wire.ts";

/** A rank of a run: where the run meets, and what must be equal on all ranks. */
export interface Membership {
  readonly rank: number;
  readonly world: number;
  /** Address and port of rank 0. */
  readonly address: string;
  readonly port: number;
  /** The secret that all ranks of the run share. */
  readonly token: string;
  /** The digest of the plan, and the version of rankc: the same on all ranks. */
  readonly plan: string;
  readonly version: string;
}

/** Settings of a peer. Times are in milliseconds. */
export interface PeerSettings extends Membership {
  readonly timeout: number;
  readonly beat: number;
  readonly lost: number;
}

/** Callbacks of a peer connection. */
export interface PeerEvents {
  readonly welcome: () => void;
  /** The hub rejected the peer, or could not be reached, before `welcome`. */
  readonly refused: (text: string, fix: string) => void;
  readonly shared: (name: string, members: readonly number[], data: Uint8Array) => void;
  /** All ranks have reached the barrier; `problem`: the first problem that one of them stated there. */
  readonly released: (name: string, problem?: string) => void;
  /** The run was aborted after `welcome`. Called once. */
  readonly abort: (text: string) => void;
  readonly hold: () => void;
  readonly last: (step: number) => void;
  readonly bye: () => void;
}

/** An open connection to the hub. */
export interface PeerConnection {
  readonly send: (message: ToHub, data?: Uint8Array) => void;
  readonly close: () => void;
}

/** Connects to the hub, and retries until `timeout`. `whereAmI` returns the heartbeat message. */
export function connectPeer(settings: PeerSettings, whereAmI: () => Beat, events: PeerEvents, clock: Clock = systemClock): PeerConnection {
  return new Connector(settings, whereAmI, events, clock);
}

type Beat = Extract<ToHub, { kind: "beat" }>;

class Connector implements PeerConnection {
  readonly #settings: PeerSettings;
  readonly #whereAmI: () => Beat;
  readonly #events: PeerEvents;
  readonly #clock: Clock;
  readonly #hub: string;
  readonly #deadline: number;
  #state: "connecting" | "waiting" | "in" | "over" = "connecting";
  #line: FramedConnection<ToHub> | undefined;
  /** Times of the last message of the hub, and of the last heartbeat. */
  #lastMessage = 0;
  #ticked = 0;
  #cancelHeartbeat: Cancel = () => {};

  constructor(settings: PeerSettings, whereAmI: () => Beat, events: PeerEvents, clock: Clock) {
    this.#settings = settings;
    this.#whereAmI = whereAmI;
    this.#events = events;
    this.#clock = clock;
    this.#hub = `rank 0 at ${settings.address}:${settings.port}`;
    this.#deadline = clock.now() + settings.timeout;
    this.#connect(100, "it did not answer");
  }

  send(message: ToHub, data?: Uint8Array): void {
    this.#line?.send(message, data);
  }

  close(): void {
    this.#end(() => {});
    this.#line?.close();
  }

  /** Connects; on failure retries after `wait` ms. `problem`: why the last attempt failed. */
  #connect(wait: number, problem: string): void {
    if (this.#state === "over") return;
    const { rank, address, port, timeout } = this.#settings;
    if (this.#clock.now() > this.#deadline) {
      const text = `rank ${rank} could not reach ${this.#hub} within ${+(timeout / 1000).toFixed(1)} s: ${problem}`;
      this.#end(() => this.#events.refused(text, reach));
      return;
    }
    const socket = connect({ host: address, port });
    let problemNow = "it closed the connection immediately";
    const cancelQuiet = this.#clock.after(Math.min(10_000, timeout), () => socket.destroy(new Error("no answer")));
    const line = framedConnection<ToRank, ToHub>(socket, ToRank, {
      limit: limits.greeting,
      ended: (found) => {
        cancelQuiet();
        if (found) problemNow = found;
        if (this.#state === "connecting") this.#clock.after(wait, () => this.#connect(Math.min(wait * 1.5, 1000), problemNow));
        else this.#hubLost(`the connection to ${this.#hub} ended: its process was killed, or it crashed`);
      },
      received: (message, data) => {
        this.#lastMessage = this.#clock.now();
        if (message.kind === "accepted") cancelQuiet();
        this.#receive(line, message, data);
      },
    });
    this.#line = line;
  }

  #receive(line: FramedConnection<ToHub>, message: ToRank, data: Uint8Array): void {
    switch (message.kind) {
      case "nonce": {
        const { rank, world, version, plan, token } = this.#settings;
        const proof = proofOf(token, message.nonce);
        line.send({ kind: "hello", proof, rank, world, version, plan, host: hostname(), pid: process.pid });
        break;
      }
      case "accepted":
        line.allow(limits.member);
        this.#state = "waiting";
        this.#ticked = this.#clock.now();
        this.#cancelHeartbeat = this.#clock.every(this.#settings.beat, () => this.#heartbeat(line));
        break;
      case "refused":
        this.#end(() => this.#events.refused(message.text, message.fix));
        break;
      case "welcome":
        this.#state = "in";
        this.#events.welcome();
        break;
      case "share":
        this.#events.shared(message.name, message.members, data);
        break;
      case "release":
        this.#events.released(message.name, message.problem);
        break;
      case "abort":
        this.#state === "in" ? this.#end(() => this.#events.abort(message.text)) : this.#hubLost(message.text);
        break;
      case "hold":
        this.#events.hold();
        break;
      case "last":
        this.#events.last(message.step);
        break;
      case "beat":
        break;
      case "bye":
        this.#end(this.#events.bye);
        break;
      default:
        message satisfies never;
    }
  }

  #heartbeat(line: FramedConnection<ToHub>): void {
    const { beat, lost } = this.#settings;
    const now = this.#clock.now();
    // after a suspension of this process, the hub is not at fault
    if (now - this.#ticked > 3 * beat) this.#lastMessage = now;
    this.#ticked = now;
    line.send(this.#whereAmI());
    if (now - this.#lastMessage > lost)
      this.#hubLost(`no message from ${this.#hub} for ${+(lost / 1000).toFixed(1)} s; its process or host is suspended`);
  }

  #hubLost(text: string): void {
    const early = this.#state !== "in";
    this.#end(() => (early ? this.#events.refused(text, "see the output of rank 0") : this.#events.abort(text)));
  }

  #end(notify: () => void): void {
    if (this.#state === "over") return;
    this.#state = "over";
    this.#cancelHeartbeat();
    notify();
  }
}

const reach = "check that rank 0 runs there and that MASTER_ADDR and MASTER_PORT are its address; RANKC_TIMEOUT=<seconds> waits longer";
