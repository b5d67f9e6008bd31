/** The rendezvous of ranks: all connect, or the error names those that did not; shared bytes arrive; when one rank ends, all end with the reason. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { hostname } from "node:os";
import { afterEach, describe, expect, test } from "vitest";
import { type Clock, systemClock } from "../../runtime/launch/clock.ts";
import { openHub } from "../../runtime/launch/hub.ts";
import { freePort } from "../../runtime/launch/launcher.ts";
import { connectPeer } from "../../runtime/launch/peer.ts";
import { type JoinSettings, type Meeting, timesOf } from "../../runtime/launch/rendezvous.ts";
import { frame, proofOf } from "../../runtime/launch/wire.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { ManualClock } from "../support/manualClock.ts";
import { built } from "../support/rankc.ts";
import { full } from "../support/tiers.ts";

// compiled, the threads of its ranks start in a fraction of the time
const { join }: typeof import("../../runtime/launch/rendezvous.ts") = await import(built("runtime/launch/rendezvous.ts"));

/** Limits that no test waits for: a busy machine delays every rank. A test that waits for one of them has its own. */
const times = { ...timesOf({}), timeout: 600, beat: 0.2, lost: 600, hang: 600 };
type Changes = Partial<JoinSettings>;
const settings = (rank: number, world: number, port: number, changes: Changes = {}): JoinSettings => ({
  ...{ rank, world, port, address: "127.0.0.1", token: "secret", plan: "a".repeat(64), version: "0.1.0", times },
  ...changes,
});
/** All ranks in this process, each with its own thread and its own connection. */
async function meet(world: number, changes: (rank: number) => Changes = () => ({})): Promise<Meeting[]> {
  const port = await freePort();
  return Promise.all(Array.from({ length: world }, (_, r) => join(settings(r, world, port, changes(r)))));
}
/** What each rank is refused with, "joined" where it is not. Without the threads, which take their time to start. */
async function refusals(all: readonly JoinSettings[], clock: Clock = systemClock, hubClock: Clock = clock): Promise<string[]> {
  const open: { close: () => void }[] = [];
  const printed = all.map(async (who): Promise<string> => {
    const { timeout, beat, lost, hang } = who.times;
    const settings = { ...who, timeout: timeout * 1000, beat: beat * 1000, lost: lost * 1000, hang: hang * 1000 };
    try {
      if (who.rank === 0) open.push(await openHub(settings, hubClock));
    } catch (error) {
      expect(error).toBeInstanceOf(Trouble);
      return (error as Trouble).message;
    }
    return new Promise((done) => {
      open.push(
        connectPeer(
          settings,
          () => ({ kind: "beat", reports: 0, step: 0, text: "" }),
          { ...ignoring, welcome: () => done("joined"), refused: done },
          clock,
        ),
      );
    });
  });
  const texts = await Promise.all(printed);
  for (const connection of open) connection.close();
  return texts;
}
const ignore = (): void => {};
const ignoring = { shared: ignore, released: ignore, abort: ignore, hold: ignore, last: ignore, bye: ignore };
/** The first wait of a peer before it connects again, in milliseconds. */
const RETRY = 100;
const leave = (all: readonly Meeting[]) => Promise.all(all.map((m) => m.close()));

describe("ranks that agree", () => {
  test("share bytes of rank 0, and within groups of their own", async () => {
    const all = await meet(4);
    const random = () => crypto.getRandomValues(new Uint8Array(128));
    const id = random();
    const got = await Promise.all(all.map((m, r) => m.broadcast("world", r === 0 ? id : undefined)));
    for (const bytes of got) expect(bytes).toEqual(id);

    const pairs = { "a 0,2": [0, 2], "b 3,1": [3, 1] };
    for (const [name, members] of Object.entries(pairs)) {
      const made = random();
      const [first, second] = await Promise.all(
        members.map((r) => all[r]!.share(name, members, () => (r === members[0] ? made : random()))),
      );
      expect(first).toEqual(made);
      expect(second).toEqual(made);
    }
    expect(await all[2]!.share("alone", [2], () => id)).toEqual(id);
    await leave(all);
  });

  test("a reused name gives the shared bytes in order", async () => {
    const [a, b] = (await meet(2)) as [Meeting, Meeting];
    await a.broadcast("x", Uint8Array.of(1));
    await a.broadcast("x", Uint8Array.of(2));
    expect([await b.broadcast("x", undefined), await b.broadcast("x", undefined)]).toEqual([Uint8Array.of(1), Uint8Array.of(2)]);
    await leave([a, b]);
  });

  test("no rank passes a barrier before all have reached it", async () => {
    const all = await meet(3);
    const passed: number[] = [];
    const first = [0, 1].map((r) => all[r]!.barrier("b").then(() => passed.push(r)));
    await new Promise((r) => setTimeout(r, 200));
    expect(passed).toEqual([]);
    await Promise.all([...first, all[2]!.barrier("b")]);
    await Promise.all(all.map((m) => m.barrier("b")));
    await leave(all);
  });

  test("a problem that one rank states at a barrier is returned to all, with its rank, and the next barrier has none", async () => {
    const all = await meet(3);
    const found = await Promise.all(all.map((m, r) => m.barrier("b", r === 1 ? "the disk is full" : undefined)));
    for (const problem of found) expect(problem).toMatch(/^rank 1 \(.*\): the disk is full$/);
    expect(await Promise.all(all.map((m) => m.barrier("b")))).toEqual([undefined, undefined, undefined]);
    await leave(all);
  });

  test("a run of one rank", async () => {
    const [only] = (await meet(1)) as [Meeting];
    await only.barrier("b");
    expect(await only.broadcast("x", Uint8Array.of(7))).toEqual(Uint8Array.of(7));
    expect(only.begin(1)).toBe(true);
    await only.close();
  });

  test.each(["::1", "localhost", hostname()])("connect at %s", async (address) => {
    await leave(await meet(2, () => ({ address })));
  });
});

describe("ranks that do not agree", () => {
  test("a missing rank 0 is reported with its address", async () => {
    const lookFor = async (port: number, address: string): Promise<string | undefined> => {
      const clock = new ManualClock();
      const all = refusals([settings(1, 2, port, { address, times: { ...times, timeout: 300 } })], clock);
      await clock.scheduled(RETRY);
      clock.suspend(301_000);
      clock.advance(0);
      return (await all)[0];
    };
    const port = await freePort();
    expect(await lookFor(port, "127.0.0.1")).toBe(`rank 1 could not reach rank 0 at 127.0.0.1:${port} within 300 s: ECONNREFUSED`);
    expect(await lookFor(port, "no-such-host.invalid")).toMatch(/rank 0 at no-such-host\.invalid:\d+ within 300 s: (ENOTFOUND|EAI_AGAIN)/);
  });

  test("the thread's refusal arrives as an error with a fix", async () => {
    const port = await freePort();
    const reason = await join(settings(1, 2, port, { times: { ...times, timeout: 0.1 } })).catch((error: unknown) => error);
    expect(reason).toMatchObject({
      name: "Trouble",
      message: `rank 1 could not reach rank 0 at 127.0.0.1:${port} within 0.1 s: ECONNREFUSED`,
      fix: expect.stringContaining("RANKC_TIMEOUT"),
    });
  });

  test("another plan or another rankc: by rank", async () => {
    const of = async (change: (r: number) => Changes) => {
      const port = await freePort();
      return refusals([0, 1, 2, 3].map((r) => settings(r, 4, port, change(r))));
    };
    const plans = await of((r) => (r === 2 ? { plan: "b".repeat(64) } : {}));
    expect(new Set(plans)).toEqual(
      new Set([`the ranks do not run the same plan: ranks 0-1, 3 have ${"a".repeat(16)}, rank 2 has ${"b".repeat(16)}`]),
    );
    const versions = await of((r) => (r === 3 ? { version: "0.2.0" } : {}));
    expect(new Set(versions)).toEqual(new Set(["the ranks do not run the same rankc: ranks 0-2 have 0.1.0, rank 3 has 0.2.0"]));
  });

  test("a rank that connects twice, one beyond the world, one of another world", async () => {
    const of = async (world: number, ...others: Changes[]) => {
      const port = await freePort();
      return (await refusals([{}, ...others].map((c, i) => settings(i, world, port, c))))[0];
    };
    expect(await of(3, {}, { rank: 1 })).toMatch(/^rank 1 connected twice: from rank 1 \(.+, process \d+\), and from /);
    expect(await of(3, { rank: 3 })).toMatch(/^rank 3 connected from .+; a world of 3 has ranks 0 to 2$/);
    expect(await of(3, { world: 4 })).toMatch(/^rank 1 on .+ was started in a world of 4, rank 0 in one of 3$/);
  });

  test("another token: the connection is refused with a reason, and the run waits for its ranks", async () => {
    const port = await freePort();
    const zero = join(settings(0, 2, port));
    const [stranger] = await refusals([settings(1, 2, port, { token: "guess" })]);
    expect(stranger).toBe("the rank 0 there belongs to another run: it has another token");
    await leave(await Promise.all([zero, join(settings(1, 2, port))]));
  });

  test("a taken port is named", async () => {
    const server = createServer().listen(0, "127.0.0.1");
    await once(server, "listening");
    const { port } = server.address() as { port: number };
    expect(await refusals([settings(0, 1, port)])).toEqual([`rank 0 cannot listen on port ${port}: another program listens there`]);
    server.close();
  });

  test("another program listens at rank 0's port", async () => {
    const server = createServer((socket) => socket.end("SSH-2.0-OpenSSH_9.6\r\n")).listen(0, "127.0.0.1");
    await once(server, "listening");
    const { port } = server.address() as { port: number };
    const clock = new ManualClock();
    const all = refusals([settings(1, 2, port)], clock);
    await clock.scheduled(RETRY);
    clock.suspend(times.timeout * 1000 + 1);
    clock.advance(0);
    expect((await all)[0]).toContain("its data is not in rankc's protocol");
    server.close();
  });
});

test("connections without the token are harmless: noise, long messages, half a frame, a hello", async () => {
  const port = await freePort();
  const [clock, hubClock] = [new ManualClock(), new ManualClock()];
  const zero = refusals([settings(0, 2, port)], clock, hubClock);
  // rank 0 itself is admitted
  await clock.scheduled(times.beat * 1000);
  const long = Buffer.concat([frame({ kind: "stop" }).subarray(0, 4), Buffer.from([255, 255, 255, 127, 0, 0, 0, 0])]);
  const hello = { kind: "hello", rank: 1, world: 2, version: "0.1.0", plan: "a", host: "h", pid: 1 } as const;
  const texts: [string, Uint8Array][] = [
    ["a browser", Buffer.from("GET / HTTP/1.1\r\nHost: gpu1\r\n\r\n")],
    ["noise", crypto.getRandomValues(new Uint8Array(4096)).fill(0, 0, 1)],
    ["a message too long", long],
    ["no hello", frame({ kind: "stop" })],
    ["a proof for another nonce", frame({ ...hello, proof: proofOf("secret", "00") })],
    ["no JSON", Buffer.concat([frame({ kind: "bye" }).subarray(0, 12), Buffer.from('{"kind":"bye!"')])],
  ];
  for (const [, bytes] of texts) {
    const socket = connect(port, "127.0.0.1");
    socket.on("error", ignore);
    socket.resume();
    socket.once("connect", () => socket.write(bytes));
    await once(socket, "close");
  }
  const half = connect(port, "127.0.0.1");
  half.on("error", ignore);
  half.write(frame({ kind: "stop" }).subarray(0, 7));
  hubClock.advance(times.timeout * 1000);
  const [text] = await zero;
  expect(text).toContain("rank 1 of 2 did not connect");
  expect(text).toMatch(/rejected \d times: its data is not in rankc's protocol \(from .*127\.0\.0\.1\)/);
  expect(text).toContain("rejected once: its token is not that of this run");
  half.destroy();
});

/** A connection that never closes its own half, and what it was sent so far. */
async function connectRaw(port: number): Promise<Socket> {
  const socket = connect({ port, host: "127.0.0.1", allowHalfOpen: true });
  socket.on("error", ignore);
  await once(socket, "connect");
  return socket;
}
const hubOf = (port: number, world: number) =>
  openHub({ world, port, address: "127.0.0.1", token: "secret", timeout: 600_000, beat: 200, lost: 600_000, hang: 600_000 });

describe("before the token is proved", () => {
  test("a connection with another token is closed at once, both ways", async () => {
    const port = await freePort();
    const hub = await hubOf(port, 2);
    const socket = await connectRaw(port);
    const hello = { kind: "hello", rank: 1, world: 2, version: "0.1.0", plan: "a", host: "h", pid: 1 } as const;
    await once(socket, "data");
    socket.write(frame({ ...hello, proof: proofOf("guess", "00") }));
    const text = String((await once(socket, "data"))[0]);
    expect(text).toContain("another token");
    // a closed connection refuses what is written to it
    const refused = new Promise((closed) => socket.once("close", closed));
    const more = setInterval(() => socket.write(Buffer.alloc(2 ** 16)), 20);
    await refused;
    clearInterval(more);
    hub.close();
  });

  test("hundreds of silent connections exclude no rank", async () => {
    const port = await freePort();
    const zero = refusals([settings(0, 2, port)]);
    let open = 0;
    const sockets: Socket[] = [];
    for (let n = 0; n < 300; n++) {
      const socket = await connectRaw(port).catch(() => undefined);
      if (!socket) continue;
      sockets.push(socket);
      open++;
      socket.resume().once("close", () => open--);
      socket.once("end", () => socket.destroy());
    }
    expect(sockets.length).toBeGreaterThan(290);
    expect(await refusals([settings(1, 2, port)])).toEqual(["joined"]);
    expect(open).toBeLessThanOrEqual(64);
    expect(await zero).toEqual(["joined"]);
    for (const socket of sockets) socket.destroy();
  });
});

/** Ranks as processes, whose main threads block. */
describe("when a rank ends, all end with the reason", () => {
  const script = built("test/support/rank.ts");
  let children: ChildProcess[] = [];
  afterEach(() => {
    for (const child of children) child.kill("SIGKILL");
    children = [];
  });

  interface Ended {
    readonly code: number | null;
    readonly signal: string | null;
    readonly err: string;
  }
  async function run(world: number, mode: string, who: number, env: Record<string, string> = {}): Promise<{ ended: Promise<Ended>[] }> {
    const place = { WORLD_SIZE: `${world}`, MASTER_ADDR: "127.0.0.1", MASTER_PORT: `${await freePort()}`, RANKC_TOKEN: "t", ...env };
    const ended = Array.from({ length: world }, async (_, r): Promise<Ended> => {
      const child = spawn(process.execPath, [script, mode, `${who}`], {
        env: { PATH: process.env.PATH!, ...place, RANK: `${r}`, LOCAL_RANK: `${r}` },
        stdio: ["ignore", "ignore", "pipe"],
      });
      children.push(child);
      let err = "";
      child.stderr!.on("data", (chunk) => (err += chunk));
      const [code, signal] = (await once(child, "close")) as [number | null, string | null];
      return { code, signal, err };
    });
    return { ended };
  }

  test("without a failure all ranks leave", async () => {
    const { ended } = await run(3, "fine", -1);
    for (const { code, err } of await Promise.all(ended)) expect([code, err]).toEqual([0, expect.stringContaining("done")]);
  });

  test("killed: the others end within seconds, even if blocked", async () => {
    const { ended } = await run(3, "kill", 2, { QUICK: "1" });
    const all = await Promise.all(ended);
    for (const [r, { signal, err }] of all.entries()) {
      expect(signal).toBe("SIGKILL");
      if (r === 2) continue;
      expect(err).toMatch(
        new RegExp(
          `^rankc: rank ${r} stops in step 7, all_reduce grads: rank 2 \\(.+, process \\d+\\) was lost: its process was killed, or it crashed$`,
          "m",
        ),
      );
      expect(err).toContain("  0-1: step 7, all_reduce grads\n  2: step 7, layers.2.w1\n");
    }
  });

  test("rank 0 killed: the others detect it", full, async () => {
    const { ended } = await run(3, "kill", 0, { QUICK: "1" });
    const [, one, two] = await Promise.all(ended);
    for (const { err } of [one!, two!])
      expect(err).toMatch(/stops in step 7, all_reduce grads: the connection to rank 0 at 127\.0\.0\.1:\d+ ended/);
  });

  test("killed: a main thread that is not blocked ends with its own message", full, async () => {
    const { ended } = await run(3, "listen", 1, { QUICK: "1" });
    const [zero, , two] = await Promise.all(ended);
    for (const { code, err } of [zero!, two!])
      expect([code, err]).toEqual([4, expect.stringMatching(/received by \d: rank 1 .+ was lost/)]);
  });

  test("an exception ends the run like a kill; a reported failure comes with its reason", full, async () => {
    const thrown = await Promise.all((await run(2, "throw", 1, { QUICK: "1" })).ended);
    expect(thrown[1]).toMatchObject({ code: 1, err: expect.stringContaining("it broke") });
    expect(thrown[0]!.err).toMatch(/rank 1 .+ was lost/);
    const results = await Promise.all((await run(3, "fail", 0, { QUICK: "1" })).ended);
    expect(results[0]!.code).toBe(3);
    for (const r of [1, 2])
      expect(results[r]!.err).toMatch(/rank 0 \(.+\) failed: out of memory\nlast known positions of the ranks:\n.+1-2: step 7/s);
  });

  test("a suspended process, and a process without progress", full, async () => {
    const stopped = (await run(3, "stop", 1, { QUICK: "1" })).ended;
    for (const r of [0, 2]) expect((await stopped[r]!).err).toMatch(/rank 1 \(.+\): no message for 5 s/);
    children[1]!.kill("SIGKILL");
    const hung = await Promise.all((await run(2, "hang", 1, { QUICK: "1" })).ended);
    for (const { signal, err } of hung)
      expect([signal, err]).toEqual(["SIGKILL", expect.stringMatching(/rank \d \(.+\) hangs: no progress for 5 s/)]);
  });

  test("the launcher has ended: the rank stops", async () => {
    const { ended } = await run(1, "block", -1, { RANKC_LAUNCHER: "1", QUICK: "1" });
    const [{ err }] = (await Promise.all(ended)) as [Ended];
    expect(err).toContain("the process that started it has ended");
  });
});

test("times are given in seconds", () => {
  expect(timesOf({ RANKC_TIMEOUT: "12.5", RANKC_HANG: "90" })).toMatchObject({ timeout: 12.5, hang: 90 });
  expect(() => timesOf({ RANKC_HANG: "soon" })).toThrow('RANKC_HANG is "soon", not a number of seconds');
});
