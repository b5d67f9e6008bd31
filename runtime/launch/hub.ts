/**
 * The hub of rank 0. It accepts all peers, verifies that they run the same plan and version, relays shared bytes, and monitors heartbeats.
 * When a peer is lost, hangs or fails, it sends all others an abort that names the peer and the position of every rank.
 */

import { randomBytes } from "node:crypto";
import { createServer, type Socket } from "node:net";
import { printable } from "../../schemas/printable.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { isLoopback } from "./place.ts";
import { rankList, ranksText } from "./rankList.ts";
import { type FramedConnection, framedConnection, limits, proves, ToHub, type ToRank } from "./wire.ts";

/** Settings of the hub. Times are in milliseconds. */
export interface HubSettings {
  readonly world: number;
  readonly address: string;
  readonly port: number;
  readonly token: string;
  /** The time limit for all ranks to connect. */
  readonly timeout: number;
  readonly beat: number;
  /** A peer without a message for this time is lost. */
  readonly lost: number;
  /** A peer without progress for this time hangs. */
  readonly hang: number;
}

interface Peer {
  readonly rank: number;
  readonly host: string;
  readonly pid: number;
  readonly version: string;
  readonly plan: string;
  readonly line: FramedConnection<ToRank>;
  heard: number;
  reports: number;
  moved: number;
  step: number;
  at: string;
  left: boolean;
  begun: number | undefined;
}

/** A listening hub. */
export interface Hub {
  readonly close: () => void;
}

/** Opens the hub; resolves when it listens. Throws a Trouble if the port is not available. */
export async function openHub(settings: HubSettings): Promise<Hub> {
  const { world, port, token, beat, lost, hang } = settings;
  const peers = new Map<number, Peer>();
  /** Connections before the handshake, with their remote addresses; the oldest first. */
  const strangers = new Map<Socket, string>();
  const turnedAway = new Map<string, number>();
  const barriers = new Map<string, Set<number>>();
  let phase: "gathering" | "meeting" | "over" = "gathering";
  let verdict: { readonly text: string; readonly fix: string } | undefined;
  let stopping = false;
  let ticked = performance.now();

  const server = createServer((socket) => onConnection(socket));
  await listen(server, settings);
  const patience = setTimeout(() => giveUp(), settings.timeout);
  const watch = setInterval(() => checkPeers(), beat);

  function onConnection(socket: Socket): void {
    const nonce = randomBytes(16).toString("hex");
    let peer: Peer | undefined;
    const from = socket.remoteAddress ?? "an unknown address";
    makeRoom(from);
    strangers.set(socket, from);
    const handshakeTimeout = setTimeout(() => socket.destroy(), HANDSHAKE);
    const done = (): void => {
      clearTimeout(handshakeTimeout);
      strangers.delete(socket);
    };
    socket.once("close", done);
    const turnAway = (why: string): void => {
      const said = `${why} (from ${from})`;
      if (turnedAway.size < 20 || turnedAway.has(said)) turnedAway.set(said, (turnedAway.get(said) ?? 0) + 1);
    };
    const peerLine = framedConnection<ToHub, ToRank>(socket, ToHub, {
      limit: limits.stranger,
      ended: (problem) => {
        if (peer) peerLost(peer, problem);
        else if (problem) turnAway(problem);
      },
      heard: (message, data) => {
        if (peer) return onMessage(peer, message, data);
        if (message.kind !== "hello") return socket.destroy();
        if (!proves(message.proof, token, nonce)) {
          turnAway("another token than this run's");
          peerLine.send({ kind: "refused", ...otherToken });
          peerLine.cut();
          return;
        }
        done();
        peerLine.allow(limits.member);
        peer = admit(message, peerLine);
      },
    });
    peerLine.send({ kind: "nonce", nonce });
  }

  /**
   * Closes the oldest connections before the handshake if there are too many. A handshake takes one round trip, so peers can connect
   * during a flood; a peer that is closed retries.
   */
  function makeRoom(from: string): void {
    const ofAddress = [...strangers].filter(([, address]) => address === from).map(([socket]) => socket);
    const surplus = [
      ...ofAddress.slice(0, Math.max(0, ofAddress.length + 1 - strangersOf(world))),
      ...[...strangers.keys()].slice(0, Math.max(0, strangers.size + 1 - 4 * strangersOf(world))),
    ];
    for (const socket of surplus) {
      strangers.delete(socket);
      socket.destroy();
    }
  }

  /** Admits a peer after the handshake. An error from here on is an error of this run and ends it on all ranks. */
  function admit(hello: Extract<ToHub, { kind: "hello" }>, peerLine: FramedConnection<ToRank>): Peer | undefined {
    const { rank, pid, plan } = hello;
    const [host, version] = [printable(hello.host), printable(hello.version)];
    const first = peers.get(rank);
    const problem =
      hello.world !== world
        ? `rank ${rank} on ${host} was started in a world of ${hello.world}, rank 0 in one of ${world}`
        : rank < 0 || rank >= world
          ? `rank ${rank} came from ${host}; in a world of ${world}, ranks end at ${world - 1}`
          : first
            ? `rank ${rank} came twice: from ${nameOf(first)}, and from ${host}, process ${pid}`
            : undefined;
    if (phase !== "gathering" || problem) {
      const { text, fix } = verdict ?? { text: problem ?? "the run is over", fix: "start each rank once, all with the same world size" };
      refuse(peerLine, text, fix);
      // a late peer does not end a run that is in progress
      if (phase === "gathering") failAll(text, fix);
      return undefined;
    }
    const now = performance.now();
    const peer: Peer = {
      ...{ rank, host, pid, version, plan, line: peerLine },
      ...{ heard: now, reports: 0, moved: now, step: 0, at: "", left: false, begun: undefined },
    };
    peers.set(rank, peer);
    peerLine.send({ kind: "accepted" });
    if (peers.size === world) start();
    return peer;
  }

  function start(): void {
    clearTimeout(patience);
    const all = [...peers.values()];
    const version = differing(all, ({ version }) => version);
    const plan = differing(all, ({ plan }) => plan.slice(0, 16));
    if (version) failAll(`the ranks do not run the same rankc: ${version}`, "install one version on all hosts");
    else if (plan) failAll(`the ranks do not run the same plan: ${plan}`, "compile once, and give every host this plan");
    if (version || plan) return;
    phase = "meeting";
    for (const { line } of all) line.send({ kind: "welcome" });
  }

  function giveUp(): void {
    const missing = Array.from({ length: world }, (_, r) => r).filter((r) => !peers.has(r));
    const others = [...turnedAway].map(([why, times]) => `\n  turned away ${times === 1 ? "once" : `${times} times`}: ${why}`);
    failAll(
      `${ranksText(missing)} of ${world} did not come to rank 0 at ${settings.address}:${port} within ${seconds(settings.timeout)}${others.join("")}`,
      "see why they did not start, and that their hosts reach this one; RANKC_TIMEOUT=<seconds> waits longer",
    );
  }

  const onMessage = (peer: Peer, message: ToHub, data: Uint8Array): void => {
    if (phase === "over") return;
    peer.heard = performance.now();
    heard[message.kind](peer, message as never, data);
  };
  const heard: { [K in ToHub["kind"]]: (peer: Peer, message: Extract<ToHub, { kind: K }>, data: Uint8Array) => void } = {
    hello: (peer) => abort(`${nameOf(peer)} said hello twice`),
    beat: (peer, { reports, step, text: at }) => {
      if (reports !== peer.reports) peer.moved = peer.heard;
      Object.assign(peer, { reports, step, at });
    },
    share: (peer, message, data) => {
      for (const member of message.members) if (member !== peer.rank) peers.get(member)?.line.send(message, data);
    },
    barrier: ({ rank }, { name }) => {
      const waiting = barriers.get(name) ?? new Set();
      barriers.set(name, waiting.add(rank));
      if (waiting.size < world) return expectReachable();
      barriers.delete(name);
      for (const { line } of peers.values()) line.send({ kind: "release", name });
    },
    fail: (peer, { text, step, at }) => {
      Object.assign(peer, { step, at, left: true });
      peer.line.send({ kind: "bye" });
      abort(`${nameOf(peer)} failed: ${text}`);
    },
    stop: () => {
      // send `hold` once: a held rank reports a step that it does not run
      if (!stopping) for (const { line } of peers.values()) line.send({ kind: "hold" });
      stopping = true;
    },
    begun: (peer, { step }) => {
      peer.begun = step;
      agreeOnLast();
    },
    bye: (peer) => {
      peer.left = true;
      if (peer.rank !== 0) peer.line.send({ kind: "bye" });
      expectReachable();
      agreeOnLast();
      // rank 0 leaves last, because its process runs the hub
      if ([...peers.values()].every(({ left }) => left)) peers.get(0)!.line.send({ kind: "bye" });
    },
  };

  function agreeOnLast(): void {
    const steps = [...peers.values()].map(({ begun, left }) => (left ? 0 : begun));
    if (!stopping || steps.includes(undefined)) return;
    const step = Math.max(...(steps as number[]));
    for (const { line } of peers.values()) line.send({ kind: "last", step });
  }

  function expectReachable(): void {
    const left = [...peers.values()].filter((peer) => peer.left).map(({ rank }) => rank);
    if (left.length === 0) return;
    for (const [name, waiting] of barriers)
      if (phase !== "over") abort(`${ranksText([...waiting])} wait at "${name}", where ${ranksText(left)} will not come: they have ended`);
  }

  function peerLost(peer: Peer, problem?: string): void {
    if (peer.left || phase === "over") return;
    peer.left = true;
    const how = problem && problem !== "ECONNRESET" ? `its connection broke (${problem})` : "it was killed, or it crashed";
    abort(`${nameOf(peer)} is gone: ${how}`);
  }

  function checkPeers(): void {
    const now = performance.now();
    // if this process was suspended, the silence is not the peers'
    const late = now - ticked > 3 * beat;
    ticked = now;
    if (phase === "over") return;
    const present = [...peers.values()].filter(({ left }) => !left);
    if (late) for (const peer of present) peer.heard = now;
    for (const { line } of present) line.send({ kind: "beat" });
    const silent = present.filter(({ heard }) => now - heard > lost);
    const stuck = present.filter(({ reports, moved }) => reports !== 0 && now - moved > hang);
    if (silent.length > 0) {
      abort(`${silent.map(nameOf).join(", ")}: nothing was heard for ${seconds(lost)}; its process or host stands still`);
    } else if (stuck.length > 0) {
      const first = stuck.reduce((a, b) => (a.moved <= b.moved ? a : b));
      abort(`${nameOf(first)} hangs: it has not moved on for ${seconds(hang)} (RANKC_HANG=<seconds> waits longer)`);
    }
  }

  /** Ends the run before all ranks are admitted. Later peers, including rank 0, get the same error. */
  function failAll(text: string, fix: string): void {
    verdict = { text, fix };
    for (const { line } of peers.values()) refuse(line, text, fix);
    rest();
  }

  function abort(text: string): void {
    if (phase === "gathering") {
      failAll(text, "see the output of that rank");
      return;
    }
    const whole = `${text}${whereText([...peers.values()])}`;
    for (const { line, left } of peers.values()) if (!left) line.send({ kind: "abort", text: whole.slice(0, 20_000) });
    rest();
  }

  function rest(): void {
    phase = "over";
    clearTimeout(patience);
    clearInterval(watch);
  }

  /** Connections of peers stay open: each peer closes its own after it has read the last message. */
  function close(): void {
    rest();
    server.close();
    for (const socket of strangers.keys()) socket.destroy();
  }

  return { close };
}

/** The handshake timeout in milliseconds. */
const HANDSHAKE = 10_000;
/** The limit of connections before the handshake per address: all ranks may be on one host and connect simultaneously. */
const strangersOf = (world: number): number => Math.max(64, world);
const otherToken = {
  text: "rank 0 there belongs to another run: it has another token",
  fix: "set MASTER_PORT, and the same RANKC_TOKEN on all ranks",
};
const nameOf = ({ rank, host, pid }: Peer): string => `rank ${rank} (${host}, process ${pid})`;
const seconds = (ms: number): string => `${+(ms / 1000).toFixed(1)} s`;
const refuse = (line: FramedConnection<ToRank>, text: string, fix: string): void => {
  line.send({ kind: "refused", text: text.slice(0, 20_000), fix });
  line.close();
};

/** Returns undefined if all values are equal; else the ranks of each value, the most common first. */
function differing(peers: readonly Peer[], of: (peer: Peer) => string): string | undefined {
  const ranks = groups(peers, of);
  if (ranks.length === 1) return undefined;
  return ranks.map(([value, ranks]) => `${ranksText(ranks)} ${ranks.length === 1 ? "has" : "have"} ${value}`).join(", ");
}

/** Lists the last known positions, with the ranks at each. */
function whereText(peers: readonly Peer[]): string {
  const places = groups(
    peers.filter(({ reports, at, step }) => reports !== 0 || at !== "" || step !== 0),
    ({ step, at }) => `step ${step}${at && `, ${at}`}`,
  );
  const shown = places.slice(0, 16).map(([place, ranks]) => `\n  ${rankList(ranks)}: ${place}`);
  const more = places.length > 16 ? `\n  and ${places.length - 16} places more` : "";
  return places.length === 0 ? "" : `\nwhere the ranks were last heard of:${shown.join("")}${more}`;
}

function groups(peers: readonly Peer[], of: (peer: Peer) => string): [string, number[]][] {
  const found = new Map<string, number[]>();
  for (const peer of peers) found.set(of(peer), [...(found.get(of(peer)) ?? []), peer.rank]);
  return [...found].sort(([, a], [, b]) => b.length - a.length);
}

/** Listens on all addresses, because a host may resolve its own name to an address that others cannot reach; on loopback if the address is loopback. */
function listen(server: ReturnType<typeof createServer>, { address, port }: HubSettings): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", ({ code }: NodeJS.ErrnoException) => {
      const found = code === "EADDRINUSE" ? "another program listens there" : code;
      reject(
        new Trouble(`rank 0 cannot listen on port ${port}: ${found}`, "set MASTER_PORT (or RANKC_PORT) to a free port, equal on all ranks"),
      );
    });
    server.listen({ port, backlog: 4096, ...(isLoopback(address) && { host: address }) }, resolve);
  });
}
