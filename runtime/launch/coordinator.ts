/**
 * The coordinator of rank 0. It admits peers, verifies that they run the same plan and version, relays shared bytes, and monitors
 * heartbeats. When a peer is lost, hangs or fails, it sends all others an abort that names the peer and the position of every rank.
 */
import { printable } from "../../schemas/printable.ts";
import type { Cancel, Clock } from "./clock.ts";
import { rankList, ranksText } from "./rankList.ts";
import type { FramedConnection, Hello, ToHub, ToRank } from "./wire.ts";

/** Settings of the coordinator. Times are in milliseconds. */
export interface CoordinatorSettings {
  readonly world: number;
  readonly address: string;
  readonly port: number;
  /** The time limit for all ranks to connect. */
  readonly timeout: number;
  readonly beat: number;
  /** A peer without a message for this time is lost. */
  readonly lost: number;
  /** A peer without progress for this time hangs. */
  readonly hang: number;
}

/** What the coordinator needs of the connection of a peer. */
export type PeerLine = Pick<FramedConnection<ToRank>, "send" | "close">;

/** A rank that has connected. Times are those of the clock. */
export interface Peer {
  readonly rank: number;
  readonly host: string;
  readonly pid: number;
  readonly version: string;
  readonly plan: string;
  readonly line: PeerLine;
  /** Time of the last message. */
  lastMessage: number;
  /** The peer's counter of reports, and the time at which it last changed. */
  reports: number;
  lastProgress: number;
  step: number;
  /** The current instruction. */
  at: string;
  left: boolean;
  /** The last step that the peer began before it was held. */
  begun: number | undefined;
}

interface Verdict {
  readonly text: string;
  readonly fix: string;
}

/** The state of one run, from the first connection to the end. */
export class Coordinator {
  readonly #settings: CoordinatorSettings;
  readonly #clock: Clock;
  readonly #rejected: ReadonlyMap<string, number>;
  readonly #peers = new Map<number, Peer>();
  readonly #barriers = new Map<string, { readonly waiting: Set<number>; problem?: string }>();
  readonly #cancelPatience: Cancel;
  readonly #cancelWatch: Cancel;
  #phase: "gathering" | "meeting" | "over" = "gathering";
  #verdict: Verdict | undefined;
  #stopping = false;
  #ticked: number;

  /** `rejected`: reasons of connections that were closed before they became peers, and how often; read for the report of missing ranks. */
  constructor(settings: CoordinatorSettings, clock: Clock, rejected: ReadonlyMap<string, number>) {
    this.#settings = settings;
    this.#clock = clock;
    this.#rejected = rejected;
    this.#ticked = clock.now();
    this.#cancelPatience = clock.after(settings.timeout, () => this.#giveUp());
    this.#cancelWatch = clock.every(settings.beat, () => this.#checkPeers());
  }

  /**
   * Admits a peer after the handshake. Returns undefined if the peer is refused. An error from here on is an error of this run and ends
   * it on all ranks.
   */
  admit(hello: Hello, line: PeerLine): Peer | undefined {
    const { rank, pid, plan } = hello;
    const [host, version] = [printable(hello.host), printable(hello.version)];
    const problem = this.#problemOf(hello, host);
    if (this.#phase !== "gathering" || problem) {
      const verdict = this.#verdict ?? { text: problem ?? "the run is over", fix: "start each rank once, all with the same world size" };
      refuse(line, verdict);
      // a late peer does not end a run that is in progress
      if (this.#phase === "gathering") this.#failAll(verdict);
      return undefined;
    }
    const now = this.#clock.now();
    const peer: Peer = {
      ...{ rank, host, pid, version, plan, line },
      ...{ lastMessage: now, reports: 0, lastProgress: now, step: 0, at: "", left: false, begun: undefined },
    };
    this.#peers.set(rank, peer);
    line.send({ kind: "accepted" });
    if (this.#peers.size === this.#settings.world) this.#start();
    return peer;
  }

  /** Handles a message of an admitted peer. */
  receive(peer: Peer, message: ToHub, data: Uint8Array): void {
    if (this.#phase === "over") return;
    peer.lastMessage = this.#clock.now();
    switch (message.kind) {
      case "hello":
        this.#abort(`${nameOf(peer)} sent a second hello`);
        break;
      case "beat":
        if (message.reports !== peer.reports) peer.lastProgress = peer.lastMessage;
        Object.assign(peer, { reports: message.reports, step: message.step, at: message.text });
        break;
      case "share":
        for (const member of message.members) if (member !== peer.rank) this.#peers.get(member)?.line.send(message, data);
        break;
      case "barrier":
        this.#barrier(peer, message.name, message.problem);
        break;
      case "fail":
        Object.assign(peer, { step: message.step, at: message.at, left: true });
        peer.line.send({ kind: "bye" });
        this.#abort(`${nameOf(peer)} failed: ${message.text}`);
        break;
      case "stop":
        // send `hold` once: a held rank reports a step that it does not run
        if (!this.#stopping) this.#sendAll({ kind: "hold" });
        this.#stopping = true;
        break;
      case "begun":
        peer.begun = message.step;
        this.#agreeOnLast();
        break;
      case "bye":
        this.#bye(peer);
        break;
      default:
        message satisfies never;
    }
  }

  /** Aborts the run because the connection of a peer has ended, unless the peer has left. */
  peerLost(peer: Peer, problem?: string): void {
    if (peer.left || this.#phase === "over") return;
    peer.left = true;
    const how = problem && problem !== "ECONNRESET" ? `its connection broke (${problem})` : "its process was killed, or it crashed";
    this.#abort(`${nameOf(peer)} was lost: ${how}`);
  }

  /** Ends the monitoring. Connections of peers stay open: each peer closes its own after it has read the last message. */
  close(): void {
    this.#phase = "over";
    this.#cancelPatience();
    this.#cancelWatch();
  }

  #problemOf({ rank, world, pid }: Hello, host: string): string | undefined {
    const expected = this.#settings.world;
    const first = this.#peers.get(rank);
    if (world !== expected) return `rank ${rank} on ${host} was started in a world of ${world}, rank 0 in one of ${expected}`;
    if (rank < 0 || rank >= expected) return `rank ${rank} connected from ${host}; a world of ${expected} has ranks 0 to ${expected - 1}`;
    return first && `rank ${rank} connected twice: from ${nameOf(first)}, and from ${host}, process ${pid}`;
  }

  #start(): void {
    this.#cancelPatience();
    const all = [...this.#peers.values()];
    const version = differing(all, ({ version }) => version);
    const plan = differing(all, ({ plan }) => plan.slice(0, 16));
    if (version) this.#failAll({ text: `the ranks do not run the same rankc: ${version}`, fix: "install one version on all hosts" });
    else if (plan)
      this.#failAll({ text: `the ranks do not run the same plan: ${plan}`, fix: "compile once, and give every host this plan" });
    if (version || plan) return;
    this.#phase = "meeting";
    this.#sendAll({ kind: "welcome" });
  }

  #giveUp(): void {
    const { world, address, port, timeout } = this.#settings;
    const missing = Array.from({ length: world }, (_, r) => r).filter((r) => !this.#peers.has(r));
    const others = [...this.#rejected].map(([why, times]) => `\n  rejected ${times === 1 ? "once" : `${times} times`}: ${why}`);
    this.#failAll({
      text: `${ranksText(missing)} of ${world} did not connect to rank 0 at ${address}:${port} within ${seconds(timeout)}${others.join("")}`,
      fix: "check that they were started and that their hosts can reach this one; RANKC_TIMEOUT=<seconds> waits longer",
    });
  }

  #barrier(peer: Peer, name: string, problem: string | undefined): void {
    const barrier = this.#barriers.get(name) ?? { waiting: new Set() };
    this.#barriers.set(name, barrier);
    barrier.waiting.add(peer.rank);
    if (problem !== undefined) barrier.problem ??= `${nameOf(peer)}: ${problem}`.slice(0, MAX_TEXT);
    if (barrier.waiting.size < this.#settings.world) {
      this.#expectReachable();
      return;
    }
    this.#barriers.delete(name);
    this.#sendAll({ kind: "release", name, ...(barrier.problem !== undefined && { problem: barrier.problem }) });
  }

  #bye(peer: Peer): void {
    peer.left = true;
    if (peer.rank !== 0) peer.line.send({ kind: "bye" });
    this.#expectReachable();
    this.#agreeOnLast();
    const all = [...this.#peers.values()];
    // rank 0 leaves last, because its process runs the hub
    if (all.every(({ left }) => left)) for (const { rank, line } of all) if (rank === 0) line.send({ kind: "bye" });
  }

  /** Sends all ranks the last step to run, once a stop is requested and every rank has left or reported the step that it began. */
  #agreeOnLast(): void {
    if (!this.#stopping) return;
    let step = 0;
    for (const { begun, left } of this.#peers.values()) {
      if (left) continue;
      if (begun === undefined) return;
      step = Math.max(step, begun);
    }
    this.#sendAll({ kind: "last", step });
  }

  #expectReachable(): void {
    const left = [...this.#peers.values()].filter((peer) => peer.left).map(({ rank }) => rank);
    if (left.length === 0) return;
    for (const [name, { waiting }] of this.#barriers)
      if (this.#phase !== "over")
        this.#abort(`${ranksText([...waiting])} wait at "${name}", which ${ranksText(left)} cannot reach: they have ended`);
  }

  #checkPeers(): void {
    const { beat, lost, hang } = this.#settings;
    const now = this.#clock.now();
    // after a suspension of this process, the peers are not at fault
    const late = now - this.#ticked > 3 * beat;
    this.#ticked = now;
    if (this.#phase === "over") return;
    const present = [...this.#peers.values()].filter(({ left }) => !left);
    if (late) for (const peer of present) peer.lastMessage = now;
    for (const { line } of present) line.send({ kind: "beat" });
    const silent = present.filter(({ lastMessage }) => now - lastMessage > lost);
    if (silent.length > 0) {
      this.#abort(`${silent.map(nameOf).join(", ")}: no message for ${seconds(lost)}; its process or host is suspended`);
      return;
    }
    const [stuck] = present
      .filter(({ reports, lastProgress }) => reports !== 0 && now - lastProgress > hang)
      .sort((a, b) => a.lastProgress - b.lastProgress);
    if (stuck) this.#abort(`${nameOf(stuck)} hangs: no progress for ${seconds(hang)} (RANKC_HANG=<seconds> waits longer)`);
  }

  #abort(text: string): void {
    if (this.#phase === "gathering") {
      this.#failAll({ text, fix: "see the output of that rank" });
      return;
    }
    const whole = `${text}${whereText([...this.#peers.values()])}`.slice(0, MAX_TEXT);
    for (const { line, left } of this.#peers.values()) if (!left) line.send({ kind: "abort", text: whole });
    this.close();
  }

  /** Ends the run before all ranks are admitted. Later peers, including rank 0, get the same error. */
  #failAll(verdict: Verdict): void {
    this.#verdict = verdict;
    for (const { line } of this.#peers.values()) refuse(line, verdict);
    this.close();
  }

  #sendAll(message: ToRank): void {
    for (const { line } of this.#peers.values()) line.send(message);
  }
}

/** The longest text of a message, in characters: the wire format allows no more. */
const MAX_TEXT = 20_000;
const nameOf = ({ rank, host, pid }: Peer): string => `rank ${rank} (${host}, process ${pid})`;
const seconds = (ms: number): string => `${+(ms / 1000).toFixed(1)} s`;
function refuse(line: PeerLine, { text, fix }: Verdict): void {
  line.send({ kind: "refused", text: text.slice(0, MAX_TEXT), fix });
  line.close();
}

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
  const more = places.length > 16 ? `\n  and ${places.length - 16} more positions` : "";
  return places.length === 0 ? "" : `\nlast known positions of the ranks:${shown.join("")}${more}`;
}

function groups(peers: readonly Peer[], of: (peer: Peer) => string): [string, number[]][] {
  const found = new Map<string, number[]>();
  for (const peer of peers) found.set(of(peer), [...(found.get(of(peer)) ?? []), peer.rank]);
  return [...found].sort(([, a], [, b]) => b.length - a.length);
}
