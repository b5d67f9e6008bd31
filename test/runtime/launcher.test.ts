/** The launcher: ranks start with their place, their output is passed on by lines, and all end when one ends, in whatever way. */
import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, test } from "vitest";
import { type Launched, type LaunchSettings, launch } from "../../runtime/launch/launcher.ts";
import { placeOf } from "../../runtime/launch/rankPlace.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { ManualClock } from "../support/manualClock.ts";
import { built } from "../support/rankc.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-launcher-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
let started = 0;

/** Ranks that run this JavaScript. */
async function ranks(
  n: number,
  code: string,
  settings: Partial<LaunchSettings> = {},
): Promise<Launched & { out: string[]; err: string[] }> {
  const printed = { stdout: [] as string[], stderr: [] as string[] };
  const launched = await launch({
    command: process.execPath,
    args: ["-e", `const rank = Number(process.env.RANK);\n${code}`],
    ranks: n,
    env: { PATH: process.env.PATH, READY: join(folder, `ready-${started++}`) },
    onLine: (stream, line) => printed[stream].push(line),
    settle: 100,
    grace: 5000,
    ...settings,
  });
  return { ...launched, out: printed.stdout, err: printed.stderr };
}
const alive = (pid: number): boolean => {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
};
const pidsIn = (lines: readonly string[]): number[] => lines.flatMap((line) => /pid (\d+)/.exec(line)?.[1] ?? []).map(Number);
/** JavaScript: one rank reports that it handles signals, another one waits for that, however long either takes to start. */
const ready = `require("fs").writeFileSync(process.env.READY, "");`;
const whenReady = (code: string) =>
  `const timer = setInterval(() => { if (require("fs").existsSync(process.env.READY)) { clearInterval(timer); ${code} } }, 20);`;
/** JavaScript: waits until the rank that has written its process number has ended and the launcher has taken notice, however long it takes to start. */
const whenGone = (code: string) =>
  `const timer = setInterval(() => {
     let pid = 0;
     try { pid = Number(require("fs").readFileSync(process.env.READY, "utf8")); } catch {}
     if (pid === 0) return;
     try { process.kill(pid, 0); } catch { clearInterval(timer); ${code} }
   }, 20);`;
const forever = "console.error('pid', process.pid); setInterval(() => {}, 1000);";

describe("ranks", () => {
  test("have their rank and one rendezvous address, with NVLink multicast off", async () => {
    const { code, out, err } = await ranks(3, "console.log(JSON.stringify(process.env))", {
      env: { PATH: process.env.PATH, OURS: "1", RANK: "77" },
    });
    expect([code, err]).toEqual([0, []]);
    const envs = out.map((line) => JSON.parse(line.replace(/^\[\d\] /, "")) as Record<string, string>);
    const places = envs.map((env) => placeOf(env, 3)!).sort((a, b) => a.rank - b.rank);
    expect(places.map(({ rank, localRank, localWorld }) => [rank, localRank, localWorld])).toEqual([0, 1, 2].map((r) => [r, r, 3]));
    expect(new Set(places.map(({ port, token, address }) => `${address}:${port} ${token}`)).size).toBe(1);
    expect(places[0]).toMatchObject({ address: "127.0.0.1", token: expect.stringMatching(/^[0-9a-f]{64}$/) });
    for (const env of envs) expect(env).toMatchObject({ OURS: "1", NCCL_NVLS_ENABLE: "0", RANKC_LAUNCHER: `${process.pid}` });
  });

  test("print line by line, with their rank as prefix; rank 0's data stays as it is", async () => {
    const { out, err } = await ranks(
      11,
      `process.stdout.write("a" + rank); process.stdout.write("b\\n\\n"); process.stderr.write("no line feed " + rank);`,
    );
    expect(out.filter((line) => !line.startsWith("["))).toEqual(["a0b", ""]);
    expect(out).toContain("[ 1] a1b");
    expect(out).toContain("[10] a10b");
    expect(err.sort().slice(0, 2)).toEqual(["[ 0] no line feed 0", "[ 1] no line feed 1"]);
    expect(err).toHaveLength(11);
  });

  test("end together: the exit code is the first failure's", async () => {
    const run = await ranks(
      3,
      `if (rank === 1) { ${whenReady("process.exit(7);")} } else { ${forever} process.on("SIGTERM", () => process.exit(9)); ${ready} }`,
    );
    expect(run).toMatchObject({ code: 7, failed: { rank: 1, how: "ended with exit code 7" } });
    expect(pidsIn(run.err).filter(alive)).toEqual([]);
  });

  test("one that ignores SIGTERM is killed", async () => {
    const clock = new ManualClock();
    const err: string[] = [];
    void clock.scheduled(100).then(() => clock.advance(100));
    const run = await ranks(
      2,
      `if (rank === 1) { ${whenReady('process.kill(process.pid, "SIGKILL");')} } else { ${forever} process.on("SIGTERM", () => console.error("no")); ${ready} }`,
      {
        clock,
        onLine(_, line) {
          err.push(line);
          // the grace is over when the rank has handled SIGTERM, and not before
          if (line === "[0] no") clock.advance(5000);
        },
      },
    );
    expect(run).toMatchObject({ code: 137, failed: { rank: 1, how: "was ended by SIGKILL" } });
    expect(err).toContain("[0] no");
    expect(pidsIn(err)).toHaveLength(1);
    expect(pidsIn(err).filter(alive)).toEqual([]);
  });

  test("have time to print their reason before they are killed", async () => {
    const run = await ranks(
      2,
      `if (rank === 1) { require("fs").writeFileSync(process.env.READY, String(process.pid)); process.exit(5); }
       process.on("SIGTERM", () => process.exit(1));
       ${whenGone('setTimeout(() => { console.error("rank 1 is gone"); process.exit(4); }, 50);')}`,
      { settle: 600_000 },
    );
    expect(run).toMatchObject({ code: 5, err: ["[0] rank 1 is gone"] });
  });

  test("a killed rank is named by the others, with the last positions of all ranks", async () => {
    const script = built("test/support/rank.ts");
    const run = await ranks(3, "", {
      ...{ args: [script, "kill", "1"], env: { PATH: process.env.PATH, QUICK: "1" }, settle: 600_000 },
    });
    expect(run).toMatchObject({ code: 137, failed: { rank: 1, how: "was ended by SIGKILL" } });
    const printed = run.err.join("\n");
    for (const r of [0, 2])
      expect(printed).toMatch(new RegExp(`^\\[${r}\\] rankc: rank ${r} stops in step 7, all_reduce grads: rank 1 .+ was lost`, "m"));
    expect(printed).toContain("[0]   1: step 7, layers.2.w1");
  });

  test("a missing command is reported", async () => {
    const printed = await ranks(2, "", { command: "/no/such/program" }).catch((error: unknown) => error);
    expect(printed).toBeInstanceOf(Trouble);
    expect((printed as Trouble).message).toBe("/no/such/program could not be started: ENOENT");
  });
});

/** The launcher as a process of its own, which can be sent signals. */
describe("signals", () => {
  const launcher = built("runtime/launch/launcher.ts");
  let child: ChildProcess | undefined;
  afterEach(() => void child?.kill("SIGKILL"));

  async function start(n: number, args: readonly string[], env: Record<string, string> = {}) {
    // the last time limit is over when all ranks have handled SIGTERM
    const code = `import { launch } from ${JSON.stringify(launcher)};
      let [expire, terminated] = [() => {}, 0];
      const clock = { now: () => 0, every: () => () => {}, after: (_, call) => ((expire = call), () => {}) };
      const { code, signal } = await launch({ command: process.execPath, args: ${JSON.stringify(args)}, ranks: ${n}, env: process.env, clock,
        onLine(stream, line) {
          process[stream].write(line + "\\n");
          if (line.endsWith("heard SIGTERM") && ++terminated === ${n}) expire();
        } });
      console.error("launched", code, signal); process.exitCode = code;`;
    const started = spawn(process.execPath, ["--input-type=module", "-e", code], {
      env: { ...process.env, ...env },
      stdio: ["ignore", "pipe", "pipe"],
    });
    child = started;
    let err = "";
    const until = (pattern: RegExp, times = 1): Promise<void> =>
      new Promise((resolve, reject) => {
        const look = () => (err.match(new RegExp(pattern, "g"))?.length ?? 0) >= times && resolve();
        started.stderr.on("data", look);
        started.once("close", () => reject(new Error(`it ended before ${pattern}: ${err}`)));
        look();
      });
    started.stderr.on("data", (chunk) => (err += chunk));
    const ended = new Promise<number | null>((resolve) => started.once("close", resolve));
    return { launcher: started, until, ended, err: () => err, pids: () => pidsIn(err.split("\n")) };
  }

  test("the first interrupt lets the ranks finish their step; the second ends them", async () => {
    const polite = await start(2, [
      "-e",
      // the listener is installed before the line that reports the start
      `process.on("SIGINT", () => { console.error("interrupted"); setTimeout(() => process.exit(0), 200); }); ${forever}`,
    ]);
    await polite.until(/pid/, 2);
    polite.launcher.kill("SIGINT");
    expect(await polite.ended).toBe(0);
    expect(polite.err().match(/interrupted/g)).toHaveLength(2);
    expect(polite.err()).toContain("launched 0 SIGINT");

    const deaf = await start(2, [
      "-e",
      `for (const s of ["SIGINT", "SIGTERM"]) process.on(s, () => console.error("heard", s)); ${forever}`,
    ]);
    await deaf.until(/pid/, 2);
    deaf.launcher.kill("SIGINT");
    await deaf.until(/heard SIGINT/, 2);
    deaf.launcher.kill("SIGINT");
    expect(await deaf.ended).toBe(137);
    expect(deaf.err().match(/heard SIGTERM/g)).toHaveLength(2);
    expect(deaf.pids().filter(alive)).toEqual([]);
  });

  test("SIGTERM ends the ranks", async () => {
    const run = await start(2, ["-e", forever]);
    await run.until(/pid/, 2);
    run.launcher.kill("SIGTERM");
    expect(await run.ended).toBe(143);
    expect(run.pids().filter(alive)).toEqual([]);
  });

  test("the ranks of a killed launcher end, even with blocked main threads", async () => {
    const script = built("test/support/rank.ts");
    const run = await start(2, [script, "block", "-1"], { QUICK: "1" });
    await run.until(/joined \d \d+/, 2);
    const pids = [...run.err().matchAll(/joined \d (\d+)/g)].map((found) => Number(found[1]));
    expect(pids.filter(alive)).toHaveLength(2);
    run.launcher.kill("SIGKILL");
    await expect.poll(() => pids.filter(alive), { timeout: 600_000 }).toEqual([]);
  });
});
