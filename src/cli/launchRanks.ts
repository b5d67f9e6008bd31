/** Starts one process for each rank, for backends whose process runs one rank. */
import { type BackendName, backends } from "../../runtime/backends.ts";
import type { Plan } from "../../schemas/plan.ts";
import { printStderr, printStdout } from "./output.ts";
import { isEarlyEnd } from "./runEnd.ts";

/** Returns whether a process of a backend runs one rank of several. */
export const runsOneOfSeveral = ({ mesh }: Plan, backend: BackendName): boolean => backends[backend].ranks === "one" && mesh.world > 1;

/**
 * Starts one process per rank with the arguments of this one, and returns their exit code. Returns undefined if this process runs all ranks,
 * or is itself one of the ranks.
 */
export async function launchRanks(plan: Plan, backend: BackendName): Promise<number | undefined> {
  const { world } = plan.mesh;
  if (!runsOneOfSeveral(plan, backend)) return undefined;
  const [{ isLoopback, placeOf }, { launch }] = await Promise.all([
    import("../../runtime/launch/rankPlace.ts"),
    import("../../runtime/launch/launcher.ts"),
  ]);
  const place = placeOf(process.env, world);
  if (place?.rank === 0 && !place.secret && !isLoopback(place.address)) printStderr(noSecret);
  if (place) return undefined;
  const [command, args] = [process.execPath, [...process.execArgv, ...process.argv.slice(1)]];
  const forward = (stream: "stdout" | "stderr", line: string): void => (stream === "stdout" ? printStdout(line) : printStderr(line));
  const { code, failed } = await launch({ command, args, ranks: world, env: process.env, onLine: forward });
  if (failed && !(failed.rank === 0 && isEarlyEnd(code))) printStderr(`rankc: rank ${failed.rank} ${failed.how}`);
  return code;
}

const noSecret = `rankc: warning: neither RANKC_TOKEN nor RANKC_TOKEN_FILE is set: anyone who reaches rank 0 over the network can compute this run's token
  fix: set RANKC_TOKEN_FILE to a file that all hosts share and only you can read (openssl rand -hex 32 > FILE)`;
