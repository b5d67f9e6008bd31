/**
 * Reads the rank of this process from the environment: from torchrun-style variables, Open MPI or Slurm, in this order. Without any of
 * them, `launch` starts the ranks.
 */
import { createHash, createHmac } from "node:crypto";
import { readFileSync, statSync } from "node:fs";
import { Trouble } from "../../schemas/trouble.ts";

/** Environment variables. */
export type Env = Readonly<Record<string, string | undefined>>;

/** The rank of this process, and the address of rank 0. */
export interface RankPlace {
  readonly by: "RANK" | "Open MPI" | "Slurm";
  readonly rank: number;
  readonly world: number;
  /** The index among the ranks of this host. */
  readonly localRank: number;
  /** The number of ranks of this host; undefined if the environment does not contain it. */
  readonly localWorld: number | undefined;
  /** The address or host name where rank 0 listens. */
  readonly address: string;
  readonly port: number;
  /** The token that a peer proves in the handshake; equal on all ranks of the run. */
  readonly token: string;
  /** Whether the token is secret: it comes from RANKC_TOKEN or RANKC_TOKEN_FILE, not only from the identity of the job. */
  readonly secret: boolean;
}

/** Returns whether only this host can reach an address. */
export const isLoopback = (address: string): boolean => /^(127\.|::1$|localhost$)/.test(address);

/** Returns the rank of this process; undefined if the environment has no ranks. `world`: ranks of the plan. Throws a Trouble if variables are missing or contradict each other. */
export function placeOf(env: Env, world: number): RankPlace | undefined {
  const place = torchrun(env) ?? openMpi(env) ?? slurm(env);
  if (!place) {
    refuseRemains(env);
    return undefined;
  }
  const { by, rank, localRank, localWorld } = place;
  if (rank >= place.world)
    throw new Trouble(`${by}: rank ${rank} of a world of ${place.world}: ranks are 0 to ${place.world - 1}`, startWays);
  if (localWorld !== undefined && localRank >= localWorld)
    throw new Trouble(`${by}: local rank ${localRank} on a host of ${localWorld} ranks: local ranks are 0 to ${localWorld - 1}`, startWays);
  if (localWorld !== undefined && localWorld > place.world)
    throw new Trouble(`${by}: ${localWorld} ranks on this host, in a world of ${place.world}`, startWays);
  if (place.world !== world)
    throw new Trouble(
      `${by} started ${place.world} rank${place.world === 1 ? "" : "s"}; the plan is for ${world}`,
      `start ${world} ranks, or compile the job with parallel.world=${place.world}`,
    );
  return place;
}

/** Returns the driver's ordinal of this rank's GPU. A scheduler that binds one GPU to each task shows one device to each rank. Throws a Trouble (exit 3) if there is no GPU for the rank. */
export function ordinalOf({ by, localRank }: Pick<RankPlace, "by" | "localRank">, devices: number): number {
  if (localRank < devices) return localRank;
  if (devices === 1 && by !== "RANK") return 0;
  throw new Trouble(
    `local rank ${localRank} has no GPU: this host shows ${devices}`,
    "start at most one rank per GPU, or widen CUDA_VISIBLE_DEVICES",
    3,
  );
}

const startWays =
  "start every rank by torchrun --no-python, srun or mpirun; without their variables, rankc run starts the ranks of this host";

function torchrun(env: Env): RankPlace | undefined {
  if (!env.RANK) return undefined;
  const needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"];
  const missing = needed.filter((name) => !env[name]);
  if (missing.length > 0)
    throw new Trouble(`RANK is set, but ${missing.join(", ")} ${missing.length === 1 ? "is" : "are"} not`, `${startWays}; or unset RANK`);
  const port = portOf(env, "MASTER_PORT");
  // the agent of torchrun may listen on MASTER_PORT itself
  const taken = env.TORCHELASTIC_USE_AGENT_STORE === "True";
  return {
    by: "RANK",
    rank: whole(env, "RANK"),
    world: whole(env, "WORLD_SIZE"),
    localRank: whole(env, "LOCAL_RANK"),
    localWorld: wholeIfSet(env, "LOCAL_WORLD_SIZE"),
    address: env.MASTER_ADDR!,
    port: ownPort(env) ?? (taken ? (port === 65535 ? port - 1 : port + 1) : port),
    ...tokenOf(env, [env.TORCHELASTIC_RUN_ID, env.TORCHELASTIC_RESTART_COUNT, env.MASTER_ADDR, env.MASTER_PORT]),
  };
}

function openMpi(env: Env): RankPlace | undefined {
  const names = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"] as const;
  if (!names.some((name) => env[name])) return undefined;
  expectAll(env, names, "do not unset them: mpirun sets all of them");
  const world = whole(env, "OMPI_COMM_WORLD_SIZE");
  const localWorld = wholeIfSet(env, "OMPI_COMM_WORLD_LOCAL_SIZE");
  const agreed = agree(env, { WORLD_SIZE: world, LOCAL_RANK: whole(env, "OMPI_COMM_WORLD_LOCAL_RANK") }, "Open MPI");
  const address = env.MASTER_ADDR || (localWorld === world ? "127.0.0.1" : undefined);
  if (!address)
    throw new Trouble(
      "Open MPI does not give the host of rank 0: MASTER_ADDR is not set",
      "pass it on: mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 …",
    );
  const job = env.PMIX_NAMESPACE || env.OMPI_MCA_ess_base_jobid;
  if (!job && !env.MASTER_PORT && !env.RANKC_PORT)
    throw new Trouble(
      "Open MPI gives no job id to derive a port from, and MASTER_PORT is not set",
      "pass it on: mpirun -x MASTER_PORT=29500 …",
    );
  return {
    by: "Open MPI",
    rank: whole(env, "OMPI_COMM_WORLD_RANK"),
    world,
    localRank: agreed.LOCAL_RANK,
    localWorld,
    address,
    port: ownPort(env) ?? (env.MASTER_PORT ? portOf(env, "MASTER_PORT") : portFrom(`${job}`)),
    ...tokenOf(env, ["Open MPI", job, env.MASTER_ADDR, env.MASTER_PORT]),
  };
}

/** A batch script also has SLURM_PROCID=0, and a shell is a step of one task: only a task of a step with several tasks is a rank. */
function slurm(env: Env): RankPlace | undefined {
  const marks = ["SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_LAUNCH_NODE_IPADDR"];
  if (!marks.some((name) => env[name])) return undefined;
  const size = env.SLURM_STEP_NUM_TASKS ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
  if (env[size] === "1") return undefined;
  expectAll(env, ["SLURM_PROCID", size, "SLURM_LOCALID"], "srun sets all of them: start with srun --ntasks=N --export=ALL");
  const world = whole(env, size);
  const localRank = whole(env, "SLURM_LOCALID");
  agree(env, { WORLD_SIZE: world, LOCAL_RANK: localRank }, "Slurm");
  const oneHost = env.SLURM_STEP_NUM_NODES === "1";
  const first = env.SLURM_STEP_NODELIST && firstHost(env.SLURM_STEP_NODELIST);
  // SLURM_LAUNCH_NODE_IPADDR may be a login node, which is not the host of rank 0, so it comes last
  const address = env.MASTER_ADDR || (oneHost ? "127.0.0.1" : first || env.SLURM_LAUNCH_NODE_IPADDR);
  if (!address) throw new Trouble("Slurm: SLURM_STEP_NODELIST is not set", "export MASTER_ADDR=<host of rank 0> before srun");
  const job = [env.SLURM_JOB_ID ?? env.SLURM_JOBID, env.SLURM_STEP_ID ?? env.SLURM_STEPID, env.SLURM_RESTART_COUNT].join(".");
  return {
    by: "Slurm",
    rank: whole(env, "SLURM_PROCID"),
    world,
    localRank,
    localWorld: oneHost ? world : undefined,
    address,
    port: ownPort(env) ?? (env.MASTER_PORT ? portOf(env, "MASTER_PORT") : portFrom(`Slurm ${job}`)),
    ...tokenOf(env, ["Slurm", env.SLURM_CLUSTER_NAME, env.SLURM_JOB_UID, job]),
  };
}

/** Returns the first host of a Slurm node list: `gpu[003-006,9],login1` → gpu003; `r[1-2]n[07-08]` → r1n07. */
export function firstHost(nodes: string): string {
  const depthZero = /^(?:[^,[]|\[[^\]]*\])*/.exec(nodes)![0];
  return depthZero.replaceAll(/\[([^\],-]*)[^\]]*\]/g, "$1");
}

/** Throws a Trouble if variables of a rank are set although no launcher is detected. */
function refuseRemains(env: Env): void {
  const remains = ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"].filter((name) => env[name]);
  if (remains.length > 0) {
    const found = remains.map((name) => `${name}=${env[name]}`).join(", ");
    throw new Trouble(
      `${found} ${remains.length === 1 ? "is" : "are"} set, but RANK is not`,
      `${startWays}; or unset ${remains.join(", ")}`,
    );
  }
}

function expectAll(env: Env, names: readonly string[], fix: string): void {
  const missing = names.filter((name) => !env[name]);
  if (missing.length === 0) return;
  const there = names.filter((name) => env[name]);
  throw new Trouble(`${there.join(", ") || "a task"} is set, but ${missing.join(", ")} ${missing.length === 1 ? "is" : "are"} not`, fix);
}

/** Throws a Trouble if torchrun-style variables contradict those of the scheduler. */
function agree<T extends Readonly<Record<string, number>>>(env: Env, own: T, by: string): T {
  for (const [name, value] of Object.entries(own))
    if (env[name] && whole(env, name) !== value)
      throw new Trouble(`${name} is ${env[name]}, but ${by} gives ${value}`, `unset ${name}, or set RANK and all its companions`);
  return own;
}

function whole(env: Env, name: string): number {
  const text = env[name] ?? "";
  if (!/^\d{1,7}$/.test(text)) throw new Trouble(`${name} is ${JSON.stringify(text)}, not a whole number`, startWays);
  return Number(text);
}
const wholeIfSet = (env: Env, name: string): number | undefined => (env[name] ? whole(env, name) : undefined);

function portOf(env: Env, name: string): number {
  const port = whole(env, name);
  if (port < 1 || port > 65535) throw new Trouble(`${name} is ${port}: ports go from 1 to 65535`, `set ${name} to a free port`);
  return port;
}
const ownPort = (env: Env): number | undefined => (env.RANKC_PORT ? portOf(env, "RANKC_PORT") : undefined);

/** A port below the ephemeral range (32768 and up on Linux), from a hash of the job. */
const portFrom = (job: string): number => 20_000 + (createHash("sha256").update(job).digest().readUInt32LE(0) % 12_000);

/**
 * Returns the token: RANKC_TOKEN; else the HMAC-SHA-256 of the job's identity with the secret in RANKC_TOKEN_FILE, so that runs that share
 * the file have different tokens; else a hash of the identity, which separates runs but is not secret.
 */
function tokenOf(env: Env, job: readonly (string | undefined)[]): Pick<RankPlace, "token" | "secret"> {
  if (env.RANKC_TOKEN) return { token: env.RANKC_TOKEN, secret: true };
  const identity = JSON.stringify(job);
  if (env.RANKC_TOKEN_FILE)
    return { token: createHmac("sha256", secretIn(env.RANKC_TOKEN_FILE)).update(identity).digest("hex"), secret: true };
  return { token: createHash("sha256").update(identity).digest("hex"), secret: false };
}

const SHORTEST_SECRET = 16;
const LONGEST_SECRET = 2 ** 16;

/** Reads the secret in a file and trims white space. Throws a Trouble if it is shorter than 16 characters or the file exceeds 64 KiB. */
function secretIn(path: string): string {
  const make = "create one, equal on all hosts: openssl rand -hex 32 > FILE; chmod 600 FILE";
  let text: string;
  try {
    const stat = statSync(path);
    if (!stat.isFile() || stat.size > LONGEST_SECRET) throw new Trouble(`RANKC_TOKEN_FILE ${path} is not a file of at most 64 KiB`, make);
    text = readFileSync(path, "utf8").trim();
  } catch (error) {
    if (error instanceof Trouble) throw error;
    throw new Trouble(`RANKC_TOKEN_FILE ${path} cannot be read: ${(error as NodeJS.ErrnoException).code}`, make);
  }
  if (text.length < SHORTEST_SECRET) throw new Trouble(`RANKC_TOKEN_FILE ${path} holds fewer than ${SHORTEST_SECRET} characters`, make);
  return text;
}
