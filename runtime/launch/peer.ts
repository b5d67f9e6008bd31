/** The connection of a peer to the hub of rank 0: connect with retry, handshake with the token, then messages and heartbeats. */
import { connect } from "node:net";
import { hostname } from "node:os";
import { type FramedConnection, framedConnection, limits, proofOf, type ToHub, ToRank } from "./wire.ts";

/** Settings of a peer. Times are in milliseconds. */
export interface PeerSettings {
  readonly rank: number;
  readonly world: number;
  readonly address: string;
  readonly port: number;
  readonly token: string;
  readonly plan: string;
  readonly version: string;
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
  readonly released: (name: string) => void;
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
export function connectPeer(settings: PeerSettings, whereAmI: () => Extract<ToHub, { kind: "beat" }>, events: PeerEvents): PeerConnection {
  const { rank, world, address, port, token, plan, version, timeout, beat, lost } = settings;
  const place = `rank 0 at ${address}:${port}`;
  const deadline = performance.now() + timeout;
  let state: "knocking" | "waiting" | "in" | "over" = "knocking";
  let current: FramedConnection<ToHub> | undefined;
  let heard = 0;
  let ticked = 0;
  let pulse: NodeJS.Timeout | undefined;

  const end = (notify: () => void): void => {
    if (state === "over") return;
    state = "over";
    clearInterval(pulse);
    notify();
  };
  const peerLost = (text: string): void => {
    const early = state !== "in";
    end(() => (early ? events.refused(text, "see the output of rank 0") : events.abort(text)));
  };

  function connectWithRetry(wait: number, problem: string): void {
    if (state === "over") return;
    if (performance.now() > deadline) {
      const text = `rank ${rank} could not reach ${place} within ${+(timeout / 1000).toFixed(1)} s: ${problem}`;
      end(() => events.refused(text, reach));
      return;
    }
    const socket = connect({ host: address, port });
    let problemNow = "it closed the connection immediately";
    const quiet = setTimeout(() => socket.destroy(new Error("no answer")), Math.min(10_000, timeout));
    current = framedConnection<ToRank, ToHub>(socket, ToRank, {
      limit: limits.greeting,
      ended: (found) => {
        clearTimeout(quiet);
        if (found) problemNow = found;
        if (state === "knocking") setTimeout(() => connectWithRetry(Math.min(wait * 1.5, 1000), problemNow), wait);
        else peerLost(`${place} is gone: its process was killed, or it crashed`);
      },
      heard: (message, data) => {
        heard = performance.now();
        if (message.kind === "accepted") clearTimeout(quiet);
        on[message.kind](message as never, data);
      },
    });
    const hello = current;
    const on: { [K in ToRank["kind"]]: (message: Extract<ToRank, { kind: K }>, data: Uint8Array) => void } = {
      nonce: ({ nonce }) => {
        const proof = proofOf(token, nonce);
        hello.send({ kind: "hello", proof, rank, world, version, plan, host: hostname(), pid: process.pid });
      },
      accepted: () => {
        hello.allow(limits.member);
        state = "waiting";
        ticked = performance.now();
        pulse = setInterval(heartbeat, beat);
      },
      refused: ({ text, fix }) => end(() => events.refused(text, fix)),
      welcome: () => {
        state = "in";
        events.welcome();
      },
      share: ({ name, members }, data) => events.shared(name, members, data),
      release: ({ name }) => events.released(name),
      abort: ({ text }) => (state === "in" ? end(() => events.abort(text)) : peerLost(text)),
      hold: events.hold,
      last: ({ step }) => events.last(step),
      beat: () => {},
      bye: () => end(events.bye),
    };
  }

  function heartbeat(): void {
    const now = performance.now();
    // if this process was suspended, the silence is not the hub's
    if (now - ticked > 3 * beat) heard = now;
    ticked = now;
    current!.send(whereAmI());
    if (now - heard > lost)
      peerLost(`nothing was heard from ${place} for ${+(lost / 1000).toFixed(1)} s; its process or host stands still`);
  }

  connectWithRetry(100, "it did not answer");
  return {
    send: (message, data) => current?.send(message, data),
    close: () => {
      end(() => {});
      current?.close();
    },
  };
}

const reach = "see that rank 0 runs there and that MASTER_ADDR and MASTER_PORT say where; RANKC_TIMEOUT=<seconds> waits longer";
