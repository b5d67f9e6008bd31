/**
 * A rank for tests, as its own process (test/support/rankc.ts compiles it): joins the rendezvous of its environment, runs steps, and fails by its arguments
 * `MODE RANK`: rank RANK fails in the way MODE. The others block their main thread, as a collective does that never ends.
 */
import { writeSync } from "node:fs";
import { placeOf } from "../../runtime/launch/rankPlace.ts";
import { join, launcherOf, timesOf } from "../../runtime/launch/rendezvous.ts";

const [mode, who] = process.argv.slice(2);
const { rank, world, address, port, token } = placeOf(process.env, Number(process.env.WORLD_SIZE))!;
const block = (ms?: number) => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
const printLine = (text: string) => writeSync(2, `${text}\n`);

// a busy machine delays every rank: only what a mode waits for has a short limit
const blocked = mode === "kill" || mode === "block";
const quick = process.env.QUICK
  ? { beat: 0.03, lost: mode === "stop" ? 5 : 600, hang: mode === "hang" ? 5 : 600, ...(blocked && { grace: 0.1 }) }
  : {};
const meeting = await join({
  ...{ rank, world, address, port, token, plan: "p".repeat(64), version: "1" },
  times: { ...timesOf(process.env), ...quick },
  ...launcherOf(process.env),
  onAbort: ({ message }) => {
    printLine(`received by ${rank}: ${message}`);
    process.exit(4);
  },
});
printLine(`joined ${rank} ${process.pid}`);

if (mode === "fine") {
  for (let step = 1; step <= 3 && meeting.begin(step); step++) await meeting.barrier(`step ${step}`);
  if (rank === 0) writeSync(1, `${JSON.stringify({ steps: 3 })}\n`);
  printLine(`done ${rank}`);
  await meeting.close();
} else {
  meeting.begin(7);
  meeting.report("layers.1.attention");
  await meeting.barrier("all are in step 7");
  meeting.report(rank === Number(who) ? "layers.2.w1" : "all_reduce grads");
  if (rank !== Number(who)) {
    if (mode === "listen") await new Promise((r) => setTimeout(r, 60_000));
    else block();
  }
  // time for twenty heartbeats, so that all know where it is
  await new Promise((r) => setTimeout(r, 600));
  if (mode === "kill" || mode === "listen") process.kill(process.pid, "SIGKILL");
  if (mode === "stop") process.kill(process.pid, "SIGSTOP");
  if (mode === "hang") block();
  if (mode === "throw") throw new Error("it broke");
  if (mode === "fail") {
    await meeting.fail("out of memory");
    process.exitCode = 3;
  }
}
