/** The command line as a person starts it, for tests: what it says, and how it exits. */
import { spawn } from "node:child_process";
import { fileURLToPath } from "node:url";

export const cli = fileURLToPath(new URL("../src/cli.ts", import.meta.url));

export interface Said {
  readonly exit: number | null;
  readonly out: string;
  readonly err: string;
}

export function rankc(...args: string[]): Promise<Said> {
  const child = spawn(process.execPath, ["--import", "tsx", cli, ...args], { env: { ...process.env, NO_COLOR: "1" } });
  const said = { out: "", err: "" };
  child.stdout.on("data", (chunk) => (said.out += chunk));
  child.stderr.on("data", (chunk) => (said.err += chunk));
  return new Promise((resolve) => child.on("close", (exit) => resolve({ exit, ...said })));
}
