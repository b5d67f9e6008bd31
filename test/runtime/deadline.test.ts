/** A script whose device hangs names the part that it is in and ends, even if its main thread is blocked. */
import { spawn } from "node:child_process";
import { expect, test } from "vitest";
import { built } from "../support/rankc.ts";

/** Returns how a script ends. It has `seconds` for its second part, which runs `rest`; its main thread has `grace` milliseconds to answer. */
async function ended(
  rest: string,
  { explain = "undefined", seconds = 0.5, grace = 300 } = {},
): Promise<{ code: number | null; signal: string | null; printed: string }> {
  const script = `
    import { startDeadline } from ${JSON.stringify(built("test/support/deadline.ts"))};
    const limits = startDeadline("bench", () => ${explain}, { grace: ${grace}, report: [process.execPath, "-e", "console.log('the device: 100 %')"] });
    limits.part("weights", 60);
    limits.part("step 3", ${seconds});
    ${rest}`;
  const child = spawn(process.execPath, ["--input-type=module", "-e", script]);
  let printed = "";
  child.stderr.on("data", (data) => (printed += data));
  return new Promise((done) => child.on("close", (code, signal) => done({ code, signal, printed })));
}

test.each([
  [
    "computes",
    "limits.at('w1.wgrad is issued'); for (;;) {}",
    300,
    "w1.wgrad is issued; the main thread does not answer: it computes, or is within a call",
  ],
  ["waits", "limits.at('all is issued'); setInterval(() => {}, 10);", 600_000, "all is issued; the device is at w1.wgrad"],
] as const)("a main thread that %s", async (_, rest, grace, words) => {
  const { signal, printed } = await ended(rest, { explain: "'the device is at w1.wgrad'", grace });
  expect(signal).toBe("SIGKILL");
  expect(printed).toMatch(/^ +\d+\.\d s {2}weights\n +\d+\.\d s {2}step 3\n/);
  expect(printed).toContain(`bench: no end of step 3 within 0.5 s; ${words}\nthe device: 100 %\n`);
});

test("a script that ends in time just ends", async () => {
  expect(await ended("limits.at('all is done')", { seconds: 600 })).toMatchObject({ code: 0, signal: null });
});
