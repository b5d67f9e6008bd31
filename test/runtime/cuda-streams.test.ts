/** Streams of a rank: communication starts before kernels that are ready at the same time. */
import { expect, test } from "vitest";
import type { Context, Event, Stream } from "../../runtime/cuda/driver.ts";
import { RankStreams } from "../../runtime/cuda/streams.ts";

test("all streams but that of compute are urgent", () => {
  const urgent: boolean[] = [];
  const context = {
    createStream: (urgency?: "urgent") => BigInt(urgent.push(urgency === "urgent")) as unknown as Stream,
    createEvent: () => 0n as unknown as Event,
  } as Partial<Context> as Context;
  const streams = new RankStreams(context);
  for (const name of ["comm", "gradients", "send 1 0", "comm"]) streams.rankStream(name);
  expect(streams.rankStream("compute")).toBe(streams.compute);
  expect(urgent).toEqual([false, true, true, true]);
});

test("events are recorded around the instructions that the predicate names, and around no other", () => {
  const recorded: string[] = [];
  let last = "";
  const context = {
    createStream: () => 1n as unknown as Stream,
    createEvent: () => 0n as unknown as Event,
    record: () => void recorded.push(last),
    elapsed: () => 1,
  } as Partial<Context> as Context;
  const streams = new RankStreams(context);
  const walk = (): void => {
    for (const id of ["embedding", "logits", "clip"]) {
      last = id;
      streams.run({ reads: [], writes: [] }, { id, op: id, kernel: id }, () => undefined);
    }
  };
  for (const [timedWork, ids] of [
    [true, ["embedding", "logits", "clip"]],
    [(id: string) => id !== "logits", ["embedding", "clip"]],
    [false, []],
  ] as const) {
    last = "begin";
    streams.begin(timedWork);
    walk();
    expect(streams.timed().map(({ id }) => id)).toEqual(ids);
  }
  expect(recorded).toEqual([
    "begin",
    "embedding",
    "embedding",
    "logits",
    "logits",
    "clip",
    "clip",
    "begin",
    "embedding",
    "embedding",
    "clip",
    "clip",
  ]);
});
