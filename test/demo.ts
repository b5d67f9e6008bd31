/** The demo: compiles plans/tiny-mixtral for 16 ranks, shows the plan, trains it for 20 steps on this CPU, and says whether it learned. */
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));
const rankc = (args: string): string => {
  const line = args.split(" ");
  process.stdout.write(`\n$ rankc ${args}\n`);
  const { status, stdout, error } = spawnSync(process.execPath, ["--import", "tsx", "src/cli/main.ts", ...line], {
    cwd: root,
    encoding: "utf8",
    maxBuffer: 2 ** 26,
    stdio: ["inherit", "pipe", "inherit"],
  });
  process.stdout.write(stdout ?? "");
  if (status !== 0) throw error ?? new Error(`rankc ${args} ended with exit code ${status}`);
  return stdout;
};

rankc("compile plans/tiny-mixtral/job.yaml -o .rankc/tiny-mixtral");
rankc("inspect .rankc/tiny-mixtral");
const trained = rankc("run .rankc/tiny-mixtral --data-dir plans/tiny-mixtral --steps 20");

const loss = Number(/loss ([\d.]+)/.exec(trained)?.[1]);
const learned = loss < 4;
process.stdout.write(learned ? `\nThe loss fell below 4.0: ${loss}.\n` : `\nThe loss did not fall below 4.0: ${loss}.\n`);
process.exitCode = learned ? 0 : 1;
