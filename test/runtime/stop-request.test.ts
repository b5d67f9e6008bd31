/** Requests to stop a run of several ranks: all of them end after the same step, which is the last that any of them has begun. */
import { expect, test } from "vitest";
import { freePort } from "../../runtime/launch/launcher.ts";
import { type Meeting, timesOf } from "../../runtime/launch/rendezvous.ts";
import { built } from "../support/rankc.ts";

// compiled, the threads of its ranks start in a fraction of the time
const { join }: typeof import("../../runtime/launch/rendezvous.ts") = await import(built("runtime/launch/rendezvous.ts"));

/** All ranks in this process, with limits that no test waits for. */
async function meet(world: number): Promise<Meeting[]> {
  const port = await freePort();
  const times = { ...timesOf({}), timeout: 600, beat: 0.2, lost: 600, hang: 600 };
  const who = { world, port, address: "127.0.0.1", token: "secret", plan: "a".repeat(64), version: "0.1.0", times };
  return Promise.all(Array.from({ length: world }, (_, rank) => join({ ...who, rank })));
}
const leave = (all: readonly Meeting[]) => Promise.all(all.map((m) => m.close()));

test("after a stop request all ranks run the same number of steps", async () => {
  const world = 4;
  const all = await meet(world);
  const ran = new Array<number>(world).fill(0);
  const run = async (r: number): Promise<void> => {
    for (let step = 1; all[r]!.begin(step); step++) {
      ran[r] = step;
      if (r === 2 && step === 5) all[2]!.stop();
      await new Promise((done) => setTimeout(done, Math.random() * 5 * (r + 1)));
      if (step === 5) all[r]!.stop();
    }
  };
  await Promise.all(all.map((_, r) => run(r)));
  expect(new Set(ran).size).toBe(1);
  expect(ran[0]).toBeGreaterThanOrEqual(5);
  await leave(all);
});

test("a rank that asks to stop begins no further step, unless another one has begun it", async () => {
  for (const last of [3, 4]) {
    const [one, other] = (await meet(2)) as [Meeting, Meeting];
    for (const step of [1, 2, 3]) expect([one.begin(step), other.begin(step)]).toEqual([true, true]);
    if (last === 4) other.begin(4);
    one.stop();
    expect([one.begin(4), other.begin(last + 1)]).toEqual([last === 4, false]);
    await leave([one, other]);
  }
});
