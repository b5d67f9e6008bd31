/** Time limits of the protocol between rank 0 and its peers, on a clock that the test advances. */
import { describe, expect, test } from "vitest";
import { Coordinator } from "../../runtime/launch/coordinator.ts";
import { openHub } from "../../runtime/launch/hub.ts";
import { freePort } from "../../runtime/launch/launcher.ts";
import { connectPeer } from "../../runtime/launch/peer.ts";
import type { ToHub, ToRank } from "../../runtime/launch/wire.ts";
import { ManualClock } from "../support/manualClock.ts";

/** In milliseconds. */
const times = { timeout: 300_000, beat: 2000, lost: 15_000, hang: 600_000 };
const settings = { world: 3, address: "10.0.0.1", port: 29500, ...times };

/** A coordinator of three ranks, some of which have connected, and the messages that it sent to each. */
function gathered(ranks: readonly number[]) {
  const clock = new ManualClock();
  const coordinator = new Coordinator(settings, clock, new Map([["noise (from 10.0.0.9)", 2]]));
  const sent = new Map<number, ToRank[]>();
  const peers = ranks.map((rank) => {
    const messages: ToRank[] = [];
    sent.set(rank, messages);
    const line = { send: (message: ToRank) => void messages.push(message), close: () => {} };
    const peer = coordinator.admit(
      { kind: "hello", proof: "", rank, world: 3, version: "1", plan: "p", host: `node${rank}`, pid: 100 + rank },
      line,
    );
    if (!peer) throw new Error(`rank ${rank} was refused`);
    return peer;
  });
  /** The last message to all ranks that is no heartbeat. */
  const last = () => [...sent.values()].map((messages) => messages.filter(({ kind }) => kind !== "beat").at(-1));
  /** Ranks send heartbeats for so many milliseconds; `reportsOf` counts what each has done by then. */
  const live = (ms: number, among: readonly number[], reportsOf: (rank: number, beat: number) => number) => {
    for (let beat = 1; beat <= ms / times.beat; beat++) {
      for (const peer of peers) {
        const message: ToHub = { kind: "beat", reports: reportsOf(peer.rank, beat), step: 7, text: `op${peer.rank}` };
        if (among.includes(peer.rank)) coordinator.receive(peer, message, new Uint8Array());
      }
      clock.advance(times.beat);
    }
  };
  return { clock, coordinator, peers, sent, last, live };
}

describe("before all ranks have connected", () => {
  test("at the time limit all connected ranks get the missing ranks and the rejected connections", () => {
    const { clock, live, last } = gathered([0]);
    live(times.timeout - times.beat, [0], (_, beat) => beat);
    clock.advance(times.beat - 1);
    expect(last()).toEqual([{ kind: "accepted" }]);
    clock.advance(1);
    expect(last()).toEqual([
      {
        kind: "refused",
        text: "ranks 1-2 of 3 did not connect to rank 0 at 10.0.0.1:29500 within 300 s\n  rejected 2 times: noise (from 10.0.0.9)",
        fix: expect.stringContaining("RANKC_TIMEOUT"),
      },
    ]);
  });

  test("no limit applies afterwards", () => {
    const { last, live } = gathered([0, 1, 2]);
    live(2 * times.timeout, [0, 1, 2], (_, beat) => beat);
    expect(last()).toEqual([0, 1, 2].map(() => ({ kind: "welcome" })));
  });
});

describe("during the run", () => {
  test("a rank without a heartbeat is named, with the positions of all ranks", () => {
    const { live, last } = gathered([0, 1, 2]);
    live(10_000, [0, 1, 2], (_, beat) => beat);
    live(12_000, [0, 2], (_, beat) => 5 + beat);
    expect(last()).toEqual([0, 1, 2].map(() => ({ kind: "welcome" })));
    live(times.beat, [0, 2], () => 20);
    const text = `rank 1 (node1, process 101): no message for 15 s; its process or host is suspended
last known positions of the ranks:
  0: step 7, op0
  1: step 7, op1
  2: step 7, op2`;
    expect(last()).toEqual([0, 1, 2].map(() => ({ kind: "abort", text })));
  });

  test("a rank with heartbeats and without progress hangs; the first of them is named", () => {
    const { live, last } = gathered([0, 1, 2]);
    live(10_000, [0, 1, 2], (_, beat) => beat);
    live(10_000, [0, 1, 2], (rank, beat) => (rank === 2 ? 5 : 5 + beat));
    live(times.hang, [0, 1, 2], (rank) => (rank === 2 ? 5 : 10));
    expect(last()).toEqual(
      [0, 1, 2].map(() => ({
        kind: "abort",
        text: expect.stringMatching(/^rank 2 \(node2, process 102\) hangs: no progress for 600 s \(RANKC_HANG/),
      })),
    );
  });

  test("of ranks that stop within one heartbeat, the first to stop is named", () => {
    const { clock, coordinator, peers, live, last } = gathered([0, 1, 2]);
    for (const peer of peers.toReversed()) {
      coordinator.receive(peer, { kind: "beat", reports: 1, step: 7, text: `op${peer.rank}` }, new Uint8Array());
      clock.advance(times.beat / 4);
    }
    live(times.hang + times.beat, [0, 1, 2], () => 1);
    const named = { kind: "abort", text: expect.stringMatching(/^rank 2 \(node2, process 102\) hangs/) };
    expect(last()).toEqual([0, 1, 2].map(() => named));
  });

  test("silence during a suspension of rank 0 is ignored", () => {
    const { clock, last } = gathered([0, 1, 2]);
    clock.suspend(10 * times.lost);
    clock.advance(times.beat);
    expect(last()).toEqual([0, 1, 2].map(() => ({ kind: "welcome" })));
  });

  test("a rank that has left needs no heartbeat", () => {
    const { coordinator, peers, live, last } = gathered([0, 1, 2]);
    for (const peer of peers.slice(1)) coordinator.receive(peer, { kind: "bye" }, new Uint8Array());
    live(10 * times.lost, [0], (_, beat) => beat);
    expect(last()).toEqual([{ kind: "welcome" }, { kind: "bye" }, { kind: "bye" }]);
  });
});

test("a peer without messages of rank 0 aborts; the time of its own suspension does not count", async () => {
  const port = await freePort();
  const ours = { address: "127.0.0.1", port, token: "secret", world: 1, ...times };
  // the hub's clock stands still: it sends no heartbeat
  const hub = await openHub(ours, new ManualClock());
  const clock = new ManualClock();
  const aborted: string[] = [];
  const ignore = (): void => {};
  const rest = { shared: ignore, released: ignore, hold: ignore, last: ignore, bye: ignore };
  let peer: ReturnType<typeof connectPeer> | undefined;
  await new Promise<void>((welcome, refused) => {
    peer = connectPeer(
      { ...ours, rank: 0, plan: "p", version: "1" },
      () => ({ kind: "beat", reports: 0, step: 0, text: "" }),
      { ...rest, welcome, refused, abort: (text) => aborted.push(text) },
      clock,
    );
  });
  clock.suspend(10 * times.lost);
  clock.advance(times.beat);
  expect(aborted).toEqual([]);
  clock.advance(times.lost - times.beat);
  expect(aborted).toEqual([]);
  clock.advance(3 * times.beat);
  expect(aborted).toEqual([`no message from rank 0 at 127.0.0.1:${port} for 15 s; its process or host is suspended`]);
  peer?.close();
  hub.close();
});
