/** A rank's place is read from what started it; half a place, or two that disagree, is refused by name. */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { rankList } from "../../runtime/launch/rankList.ts";
import { type Env, firstHost, isLoopback, ordinalOf, placeOf } from "../../runtime/launch/rankPlace.ts";
import { Trouble } from "../../schemas/trouble.ts";

const torchrun: Env = { RANK: "5", WORLD_SIZE: "8", LOCAL_RANK: "1", LOCAL_WORLD_SIZE: "4", MASTER_ADDR: "gpu1", MASTER_PORT: "29500" };
const openMpi: Env = {
  OMPI_COMM_WORLD_RANK: "5",
  OMPI_COMM_WORLD_SIZE: "8",
  OMPI_COMM_WORLD_LOCAL_RANK: "1",
  OMPI_COMM_WORLD_LOCAL_SIZE: "4",
  PMIX_NAMESPACE: "prterun-gpu1-991@1",
  MASTER_ADDR: "gpu1",
};
const slurm: Env = {
  SLURM_JOB_ID: "4711",
  SLURM_STEP_ID: "2",
  SLURM_PROCID: "5",
  SLURM_NTASKS: "8",
  SLURM_LOCALID: "1",
  SLURM_STEP_NODELIST: "gpu[07-08]",
  SLURM_LAUNCH_NODE_IPADDR: "10.0.0.1",
};
const sites = { torchrun, openMpi, slurm };

const troubleOf = (env: Env, world = 8): string => {
  try {
    return `no trouble: ${JSON.stringify(placeOf(env, world))}`;
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    expect(error.fix).toBeTruthy();
    return error.message;
  }
};

test.each(Object.entries(sites))("%s: the rank, the world, the GPU and the way to rank 0", (_, env) => {
  expect(placeOf(env, 8)).toMatchObject({ rank: 5, world: 8, localRank: 1 });
  expect(placeOf(env, 8)!.address).toMatch(/^gpu0?[17]$/);
});

test("an environment without ranks gives no place", () => {
  expect(placeOf({ PATH: "/bin", MASTER_ADDR: "gpu1", MASTER_PORT: "1" }, 8)).toBeUndefined();
});

test.each(Object.entries(sites))("%s: all ranks find one port and one token; another job, others", (name, env) => {
  const ranks = Array.from({ length: 8 }, (_, r) =>
    placeOf(
      {
        ...env,
        ...(name === "torchrun" ? { RANK: `${r}` } : name === "slurm" ? { SLURM_PROCID: `${r}` } : { OMPI_COMM_WORLD_RANK: `${r}` }),
      },
      8,
    ),
  );
  expect(new Set(ranks.map((p) => `${p!.port} ${p!.token}`)).size).toBe(1);
  const other = placeOf({ ...env, SLURM_JOB_ID: "4712", PMIX_NAMESPACE: "prterun-gpu1-992@1", TORCHELASTIC_RUN_ID: "x" }, 8)!;
  expect(other.token).not.toBe(ranks[0]!.token);
  expect(placeOf({ ...env, RANKC_TOKEN: "ours", RANKC_PORT: "4000" }, 8)).toMatchObject({ token: "ours", port: 4000 });
});

describe("the token", () => {
  const folder = mkdtempSync(join(tmpdir(), "rankc-place-"));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  const put = (name: string, text: string): string => {
    writeFileSync(join(folder, name), text);
    return join(folder, name);
  };
  const tokenOf = (env: Env) => placeOf({ ...torchrun, ...env }, 8)!;

  test("of the job's identity alone is no secret", () => {
    expect(tokenOf({}).secret).toBe(false);
    expect(tokenOf({ RANKC_TOKEN: "ours" })).toMatchObject({ token: "ours", secret: true });
  });
  test("of a secret file is the same on all ranks, and another for another file or run", () => {
    const a = put("a", "a secret of sixteen bytes\n");
    const of = (env: Env): string => tokenOf({ RANKC_TOKEN_FILE: a, ...env }).token;
    expect(tokenOf({ RANKC_TOKEN_FILE: a })).toMatchObject({ secret: true, token: expect.stringMatching(/^[0-9a-f]{64}$/) });
    expect(of({ RANK: "3", LOCAL_RANK: "3" })).toBe(of({}));
    expect(of({ TORCHELASTIC_RUN_ID: "next" })).not.toBe(of({}));
    expect(of({ RANKC_TOKEN_FILE: put("b", "another secret, as long") })).not.toBe(of({}));
  });
  test.each([
    ["no file", () => join(folder, "none"), "cannot be read: ENOENT"],
    ["a folder", () => folder, "is not a file"],
    ["a file without end", () => "/dev/zero", "is not a file"],
    ["a short secret", () => put("short", "hunter2\n"), "fewer than 16 characters"],
  ])("%s is refused", (_, path, says) => expect(troubleOf({ ...torchrun, RANKC_TOKEN_FILE: path() })).toContain(says));
  test("addresses of this host alone", () => {
    expect(["127.0.0.1", "localhost", "::1"].every(isLoopback)).toBe(true);
    expect(["gpu1", "10.0.0.1", "127-0-0-1.example"].some(isLoopback)).toBe(false);
  });
});

describe("torchrun", () => {
  test("each of its variables is needed", () => {
    for (const name of ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
      expect(troubleOf({ ...torchrun, [name]: undefined })).toBe(`RANK is set, but ${name} is not`);
    expect(troubleOf({ WORLD_SIZE: "8", LOCAL_RANK: "0" })).toBe("WORLD_SIZE=8, LOCAL_RANK=0 are set, but RANK is not");
  });
  test("ranks and sizes fit each other", () => {
    expect(troubleOf({ ...torchrun, RANK: "8" })).toContain("rank 8 of a world of 8");
    expect(troubleOf({ ...torchrun, LOCAL_RANK: "4" })).toContain("local rank 4 on a host of 4");
    expect(troubleOf({ ...torchrun, LOCAL_WORLD_SIZE: "16" })).toContain("16 ranks on this host, in a world of 8");
    expect(troubleOf({ ...torchrun, RANK: "two" })).toBe('RANK is "two", not a whole number');
    expect(troubleOf({ ...torchrun, RANK: "-1" })).toBe('RANK is "-1", not a whole number');
    expect(troubleOf({ ...torchrun, MASTER_PORT: "70000" })).toContain("ports go from 1 to 65535");
  });
  test("the world is the plan's", () => {
    expect(troubleOf(torchrun, 16)).toBe("RANK started 8 ranks; the plan is for 16");
  });
  test("its agent keeps the port that it hands out", () => {
    expect(placeOf({ ...torchrun, TORCHELASTIC_USE_AGENT_STORE: "True" }, 8)!.port).toBe(29501);
    expect(placeOf({ ...torchrun, TORCHELASTIC_USE_AGENT_STORE: "False" }, 8)!.port).toBe(29500);
  });
  test("it goes before a scheduler that started it", () => {
    expect(placeOf({ ...slurm, ...torchrun, RANK: "3", SLURM_PROCID: "0" }, 8)).toMatchObject({ by: "RANK", rank: 3 });
  });
});

describe("Open MPI", () => {
  test("on one host, rank 0 is here", () => {
    expect(placeOf({ ...openMpi, OMPI_COMM_WORLD_LOCAL_SIZE: "8", MASTER_ADDR: "" }, 8)!.address).toBe("127.0.0.1");
  });
  test("on several hosts, rank 0's address is required", () => {
    expect(troubleOf({ ...openMpi, MASTER_ADDR: "" })).toContain("MASTER_ADDR is not set");
  });
  test("missing variables are named", () => {
    expect(troubleOf({ OMPI_COMM_WORLD_RANK: "0" })).toBe(
      "OMPI_COMM_WORLD_RANK is set, but OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK are not",
    );
  });
});

describe("Slurm", () => {
  test("a batch script and a shell are no ranks", () => {
    const batch = { SLURM_JOB_ID: "4711", SLURM_PROCID: "0", SLURM_NTASKS: "8", SLURM_LOCALID: "0", SLURM_NODELIST: "gpu[07-08]" };
    expect(placeOf(batch, 8)).toBeUndefined();
    expect(placeOf({ ...batch, SLURM_STEP_ID: "0", SLURM_NTASKS: "1" }, 8)).toBeUndefined();
  });
  test("rank 0 is on the first host of the step, wherever srun was called", () => {
    expect(placeOf(slurm, 8)!.address).toBe("gpu07");
    expect(placeOf({ ...slurm, SLURM_STEP_NODELIST: undefined }, 8)!.address).toBe("10.0.0.1");
    expect(placeOf({ ...slurm, SLURM_STEP_NUM_NODES: "1" }, 8)!.address).toBe("127.0.0.1");
    expect(placeOf({ ...slurm, MASTER_ADDR: "ib-gpu07", MASTER_PORT: "4001" }, 8)).toMatchObject({ address: "ib-gpu07", port: 4001 });
  });
  test("missing variables are named", () => {
    expect(troubleOf({ ...slurm, SLURM_LOCALID: undefined })).toBe("SLURM_PROCID, SLURM_NTASKS is set, but SLURM_LOCALID is not");
  });
  test("variables of a script must agree with the scheduler", () => {
    expect(placeOf({ ...slurm, WORLD_SIZE: "8" }, 8)).toMatchObject({ by: "Slurm" });
    expect(troubleOf({ ...slurm, WORLD_SIZE: "2" })).toBe("WORLD_SIZE is 2, but Slurm gives 8");
  });
  test.each([
    ["gpu[003-006,9],login1", "gpu003"],
    ["login1,gpu[003-006,9]", "login1"],
    ["r[1-2]n[07-08]", "r1n07"],
    ["node7", "node7"],
    ["a[5,7]-ib,b", "a5-ib"],
  ])("the first host of %s is %s", (nodes, first) => expect(firstHost(nodes)).toBe(first));
});

test("a rank's GPU: by local rank, or the one that the site bound to it", () => {
  expect(ordinalOf({ by: "RANK", localRank: 3 }, 8)).toBe(3);
  expect(ordinalOf({ by: "Slurm", localRank: 3 }, 1)).toBe(0);
  expect(() => ordinalOf({ by: "RANK", localRank: 3 }, 1)).toThrow("local rank 3 has no GPU: this host shows 1");
  expect(() => ordinalOf({ by: "Slurm", localRank: 3 }, 2)).toThrow(Trouble);
});

test("ranks are listed in runs", () => {
  expect(rankList([7, 0, 1, 2, 5])).toBe("0-2, 5, 7");
  expect(rankList([])).toBe("");
});
