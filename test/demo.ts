/** The demo: compiles plans/tiny-mixtral for 16 ranks, shows the plan, trains it for 20 steps on this CPU, and says whether it learned. */
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));

/** The commands of the demo; the last one trains. */
export const demoCommands = (plan: string, steps = 20): readonly string[] => [
  `compile plans/tiny-mixtral/job.yaml -o ${plan}`,
  `inspect ${plan}`,
  `run ${plan} --data-dir plans/tiny-mixtral --steps ${steps}`,
];

/** The loss that the last command printed. */
export const lossIn = (printed: string): number => Number(/loss ([\d.]+)/.exec(printed)?.[1]);

function rankc(args: string): string {
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
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const loss = lossIn(demoCommands(".rankc/tiny-mixtral").map(rankc).at(-1) ?? "");
  const learned = loss < 4;
  process.stdout.write(learned ? `\nThe loss fell below 4.0: ${loss}.\n` : `\nThe loss did not fall below 4.0: ${loss}.\n`);
  process.exitCode = learned ? 0 : 1;
}
