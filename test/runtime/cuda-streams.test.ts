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
