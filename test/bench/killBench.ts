/**
 * Kills a run with SIGKILL at random moments, also while it saves, and continues it with --resume auto until it is complete. Law: after
 * every kill there is a checkpoint to resume from (once the first is complete), and the last checkpoint has the bytes of a run that was
 * never killed.
 *
 *   node --import tsx/esm test/bench/killBench.ts [KILLS] [SEED]
 */
import { spawn } from "node:child_process";
import { copyFileSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { expectComplete } from "../../runtime/checkpoint/commit.ts";
import { checkpointsIn } from "../../runtime/checkpoint/saveFolder.ts";
import { fixture } from "../support/job.ts";
import { builtCli } from "../support/rankc.ts";

const [kills = 100, seed = 1] = process.argv.slice(2).map(Number);
const place = mkdtempSync(join(tmpdir(), "rankc-kill-"));
const job = join(place, "job.yaml");
copyFileSync(fixture("corpus.txt"), join(place, "corpus.txt"));
// a large embedding and a small rest: a save takes about as long as two steps
writeFileSync(
  job,
  `name: kill
model: {layers: 1, hidden: 64, heads: 2, vocab: 8192, seq: 8, dropout: {hidden: 0.1}}
parallel: {world: 2, distributed_optimizer: true}
train: {global_batch: 2, steps: ${4 * kills}, precision: fp32, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt, order: shuffled}
`,
);
let state = seed;
const random = (): number => {
  state = (state * 48271) % 2147483647;
  return state / 2147483647;
};

const cli = builtCli();
function start(folder: string) {
  const options = ["--save", folder, "--save-every", "1", "--keep", "2", "--resume", "auto"];
  const child = spawn(process.execPath, [cli, "run", job, ...options], { stdio: ["ignore", "ignore", "pipe"] });
  let err = "";
  child.stderr.on("data", (chunk) => (err += chunk));
  const ended = new Promise<number | null>((resolve) => child.on("close", resolve));
  return { child, ended, err: () => err };
}

const completeIn = (folder: string) => checkpointsIn(folder).filter(({ whole }) => whole);

/** Runs until step `last`, killed so many times on the way. Returns what the kills found. */
async function campaign(folder: string) {
  const found = { kills: 0, duringSave: 0, before: 0, lost: 0, resumed: 0 };
  for (;;) {
    const newest = completeIn(folder).at(-1)?.step ?? 0;
    const run = start(folder);
    if (found.kills < kills) {
      // the run is under way when it has saved once more
      for (let waited = 0; (completeIn(folder).at(-1)?.step ?? 0) <= newest && run.child.exitCode === null && waited < 60_000; waited += 5)
        await setTimeout(5);
      await setTimeout(random() * 400);
      run.child.kill("SIGKILL");
    }
    const code = await run.ended;
    if (code !== null && code !== 0) throw new Error(`the run ended with ${code}: ${run.err()}`);
    if (code === 0) return found;
    found.kills++;
    found.duringSave += Number(readdirSync(folder).some((name) => name.endsWith(".part")));
    const left = completeIn(folder);
    if (left.length === 0) {
      found.before++;
      continue;
    }
    for (const { name } of left) expectComplete(join(folder, name));
    if ((left.at(-1)?.step ?? 0) < newest) found.lost++;
    else found.resumed++;
  }
}

const bytesOf = (folder: string): string[] => {
  const at = join(folder, completeIn(folder).at(-1)?.name ?? "");
  return readdirSync(at).map((name) => `${name} ${readFileSync(join(at, name)).toString("base64")}`);
};

try {
  const begun = performance.now();
  const whole = start(join(place, "whole"));
  const code = await whole.ended;
  if (code !== 0) throw new Error(whole.err());
  const wholeSeconds = (performance.now() - begun) / 1000;
  const found = await campaign(join(place, "killed"));
  const [expected, killed] = [bytesOf(join(place, "whole")), bytesOf(join(place, "killed"))];
  const same = expected.length === killed.length && expected.every((file, i) => file === killed[i]);
  process.stdout.write(
    `${found.kills} kills (seed ${seed}), ${found.duringSave} of them while a checkpoint was written; ${found.resumed} continued from the newest checkpoint, ` +
      `${found.before} came before the first, ${found.lost} lost one that was complete\n` +
      `last checkpoint: ${same ? "the same bytes as without kills" : "DIFFERENT BYTES"} (${4 * kills} steps; ${wholeSeconds.toFixed(0)} s without kills, ${((performance.now() - begun) / 1000 - wholeSeconds).toFixed(0)} s with)\n`,
  );
  if (!same || found.lost > 0) process.exitCode = 1;
} finally {
  rmSync(place, { recursive: true, force: true });
}
