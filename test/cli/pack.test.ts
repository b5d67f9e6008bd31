/** A pack runs its plan where there is no Node, no npm and no network; its bytes are a function of what went in. */
import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Trouble } from "../../schemas/trouble.ts";
import { dataOf, type Packed, pack } from "../../src/cli/archive.ts";
import { tar } from "../../src/cli/tar.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { printPlanText } from "../../src/report/planText.ts";
import { root } from "../support/checkout.ts";
import { rankc } from "../support/rankc.ts";
import { full, isFull } from "../support/tiers.ts";

const work = mkdtempSync(join(tmpdir(), "rankc-pack-"));
afterAll(() => rmSync(work, { recursive: true, force: true }));

const troubleOf = async (packing: Promise<unknown>): Promise<Trouble> => {
  const printed: unknown = await packing.catch((error: unknown) => error);
  expect(printed).toBeInstanceOf(Trouble);
  return printed as Trouble;
};

/** plans/tiny-dense, compiled for the CPU, its corpus at the path of the job. */
function compilePlan(): string {
  const path = join(root, "plans/tiny-dense/job.yaml");
  const { job } = readJob(readFileSync(path, "utf8"), path, []);
  const { plan } = compile(job!);
  const folder = join(work, "plans/tiny");
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, "plan.json"), printPlan(plan));
  writeFileSync(join(folder, "plan.txt"), printPlanText(plan));
  writeFileSync(join(folder, "metrics.jsonl"), "not the plan's");
  mkdirSync(join(folder, "kernels"));
  writeFileSync(join(folder, "kernels", "stray.cu"), "not the plan's");
  mkdirSync(join(work, "plans/tiny-mixtral"));
  cpSync(join(root, "plans/tiny-mixtral/corpus.txt"), join(work, "plans/tiny-mixtral/corpus.txt"));
  return folder;
}
let plan: string;
beforeAll(() => void (plan = compilePlan()));

/** A folder with a program that stands for xz and copies its input: to compress Node takes most of the time of a pack. */
const copyingXz = join(work, "bin");
mkdirSync(copyingXz);
writeFileSync(join(copyingXz, "xz"), "#!/bin/sh\nexec cat\n", { mode: 0o755 });
async function withCopyingXz<T>(run: () => Promise<T>): Promise<T> {
  const { PATH } = process.env;
  process.env.PATH = `${copyingXz}:${PATH}`;
  try {
    return await run();
  } finally {
    process.env.PATH = PATH;
  }
}

const noXz = isFull && spawnSync("xz", ["--version"]).status !== 0;

describe.skipIf(noXz)(`a pack${noXz ? " (skipped: xz is not on this machine)" : ""}`, () => {
  const out = join(work, isFull ? "tiny.tar.xz" : "tiny.tar");
  const there = join(work, "there/tiny");
  let packed: Packed;
  beforeAll(async () => {
    const packing = () => pack({ plan, out });
    packed = await (isFull ? packing() : withCopyingXz(packing));
    mkdirSync(join(work, "there"));
    execFileSync("tar", ["-xf", out, "-C", join(work, "there")]);
  });

  test("is small, and its reported size is correct", () => {
    const bytes = readFileSync(out);
    expect(packed).toMatchObject({
      out,
      bytes: bytes.length,
      sha256: createHash("sha256").update(bytes).digest("hex"),
      corpus: "tiny/tiny-mixtral/corpus.txt",
    });
    if (isFull) expect(bytes.length).toBeLessThan(40e6);
    expect(readdirSync(join(work, "there"))).toEqual(["tiny"]);
    expect(readdirSync(work).filter((name) => name.endsWith(".tmp"))).toEqual([]);
  });

  const run = (command: string, args: readonly string[], cwd: string) =>
    spawnSync("/usr/bin/env", ["-i", "PATH=/usr/bin:/bin", command, ...args], { cwd, encoding: "utf8" });

  test("runs its plan from any folder, with an empty environment", () => {
    const here = run("./rankc", ["run", "plan", "--backend", "cpu", "--steps", "2"], there);
    expect([here.status, here.stdout], here.stderr).toEqual([0, expect.stringMatching(/^2 steps in .*, loss \d/)]);
    const link = join(work, "a link");
    symlinkSync(join(there, "rankc"), link);
    const elsewhere = run(link, ["run", join(there, "plan"), "--steps", "1", "--format", "json"], tmpdir());
    expect(JSON.parse(elsewhere.stdout), elsewhere.stderr).toMatchObject({ steps: 1 });
  });

  test("contains the native packages of this system only", () => {
    const packages = join(there, "lib/node_modules");
    expect(readdirSync(join(packages, "webgpu/dist"))).toEqual([`${process.platform}-${process.arch}`]);
    expect(readdirSync(join(packages, "@koromix"))).toEqual([`koffi-${process.platform}-${process.arch}`]);
    const load = `const { create } = await import("webgpu"); const koffi = await import("koffi"); console.log(typeof create, koffi.default.load(null).func("getpid", "int", [])() === process.pid)`;
    const loaded = run(join(there, "lib/node"), ["--input-type=module", "-e", load], join(there, "lib"));
    expect(loaded.stdout, loaded.stderr).toBe("function true\n");
  });

  test("contains the plan and its runtime; no sources, tests or tools", () => {
    expect(readdirSync(there).sort()).toEqual(["lib", "plan", "rankc", "tiny-mixtral"]);
    expect(readdirSync(join(there, "plan")).sort()).toEqual(["plan.json", "plan.txt"]);
    for (const name of ["typescript", "vitest", "tsx", "@types"])
      expect(existsSync(join(there, "lib/node_modules", name)), name).toBe(false);
    expect(run("./rankc", ["explain", "P101"], there).status).toBe(0);
    expect(statSync(join(there, "lib/node")).mode & 0o777).toBe(0o755);
  });
});

test("a corpus of ids is packed with its index", () => {
  const folder = join(work, "indexed");
  mkdirSync(folder);
  const data = { path: "ids.bin", format: "tokens", dtype: "u16", labels: null, tokenizer: "bytes", order: "sequential" } as const;
  const packed = () => {
    const whole = parsePlan(readFileSync(join(plan, "plan.json"), "utf8"), "plan.json");
    return dataOf({ ...whole, job: { ...whole.job, data } }, folder, undefined)?.map(({ path }) => path);
  };
  writeFileSync(join(folder, "ids.bin"), "ids");
  expect(packed()).toEqual(["plan/ids.bin"]);
  writeFileSync(join(folder, "ids.idx"), "index");
  expect(packed()).toEqual(["plan/ids.bin", "plan/ids.idx"]);
});

test("a corpus beside the job of a plan is packed: the plan remembers where that is", () => {
  const folder = join(work, "beside");
  const own = join(folder, "plan");
  mkdirSync(own, { recursive: true });
  const text = readFileSync(join(plan, "plan.json"), "utf8");
  writeFileSync(join(own, "plan.json"), text);
  const whole = parsePlan(text, "plan.json");
  const job = { ...whole.job, data: { ...whole.job.data, path: "corpus.txt" } };
  const packed = () => dataOf({ ...whole, job }, own, undefined)?.map(({ path }) => path);
  writeFileSync(join(folder, "corpus.txt"), "text");
  expect(packed()).toBe(undefined);
  writeFileSync(join(own, "data_dir.txt"), "..\n");
  expect(packed()).toEqual(["plan/corpus.txt"]);
});

test("an archive is a function of its files: sorted, no owner, one time", () => {
  const entry = (path: string, executable: boolean, text: string) => ({ path, executable, read: () => Buffer.from(text) });
  const long = `${"folder/".repeat(14)}${"f".repeat(90)}`;
  const files = [entry("b/run", true, "#!"), entry("a", false, "x".repeat(512)), entry(long, false, "deep"), entry("empty", false, "")];
  const bytes = Buffer.concat([...tar(files)]);
  expect(Buffer.concat([...tar(files.toReversed())])).toEqual(bytes);
  expect(bytes.length % 512).toBe(0);
  const file = join(work, "a.tar");
  writeFileSync(file, bytes);
  const listed = execFileSync("tar", ["--numeric-owner", "--utc", "-tvf", file], {
    encoding: "utf8",
    env: { ...process.env, LC_ALL: "C" },
  }).split("\n");
  expect(listed.map((line) => line.replaceAll(/ +/g, " "))).toEqual([
    "-rw-r--r-- 0/0 512 2000-01-01 00:00 a",
    "-rwxr-xr-x 0/0 2 2000-01-01 00:00 b/run",
    "-rw-r--r-- 0/0 0 2000-01-01 00:00 empty",
    `-rw-r--r-- 0/0 4 2000-01-01 00:00 ${long}`,
    "",
  ]);
  const unpacked = join(work, "unpacked");
  mkdirSync(unpacked);
  execFileSync("tar", ["-xf", file, "-C", unpacked]);
  expect(readFileSync(join(unpacked, long), "utf8")).toBe("deep");
  expect(() => [...tar([entry("f".repeat(101), false, "")])]).toThrow("too long");
});

test("the command prints which files it wrote and which it omitted", full, async () => {
  const alone = join(work, "alone");
  cpSync(plan, alone, { recursive: true });
  // --data-dir allows a corpus behind a symbolic link
  symlinkSync(join(work, "plans/tiny-mixtral"), join(work, "tiny-mixtral"));
  const out = join(work, "alone.tar");
  const printed = await withCopyingXz(() => rankc("pack", join(alone, "plan.json"), "-o", out));
  const sha256 = createHash("sha256").update(readFileSync(out)).digest("hex");
  expect([printed.exit, printed.out]).toEqual([
    0,
    expect.stringMatching(new RegExp(`^${out}: [\\d.]+ MiB, [\\d,]+ files, for ${process.platform}-.+\nsha256 ${sha256}\n$`)),
  ]);
  expect(printed.err).toContain("the archive has no corpus");
  expect(printed.err).toMatch(/^packing: \d+ of \d+ files$/m);
});

test("a kernel behind a symbolic link that leads out of the plan is not packed", async () => {
  const path = join(root, "plans/tiny-dense/job.yaml");
  const { job } = readJob(readFileSync(path, "utf8"), path, []);
  const { plan, sources } = compile(job!, { target: await loadTarget("webgpu") });
  const folder = join(work, "linked");
  mkdirSync(join(folder, "kernels"), { recursive: true });
  writeFileSync(join(folder, "plan.json"), printPlan(plan));
  for (const [file, text] of sources) writeFileSync(join(folder, "kernels", file), text);
  const [file, text] = [...sources][0]!;
  const [elsewhere, here] = [join(work, file), join(folder, "kernels", file)];
  writeFileSync(elsewhere, text);
  rmSync(here);
  symlinkSync(elsewhere, here);
  const out = join(work, "linked.tar.xz");
  expect((await troubleOf(pack({ plan: folder, out }))).message).toBe(`${here} leads out of the plan's directory`);
  writeFileSync(elsewhere, "another text");
  expect((await troubleOf(pack({ plan: folder, out }))).message).toBe(`${here} was changed since the plan was compiled`);
  expect(existsSync(out)).toBe(false);
});

describe("errors are reported before anything is written", () => {
  const out = join(work, "no.tar.xz");
  test.each([
    ["another platform", { platform: "linux-riscv64" }, /Node for linux-riscv64 is not available/, 3],
    ["no plan", { plan: work }, /holds no plan\.json/, 2],
    ["no such folder for the archive", { out: join(work, "none", "a.tar.xz") }, /cannot be written/, 2],
    ["a corpus that is not there", { dataDir: work }, /the corpus does not exist/, 2],
  ])("%s", async (_, settings, message, exit) => {
    const trouble = await troubleOf(pack({ plan, out, ...settings }));
    expect([trouble.message, trouble.exit]).toEqual([expect.stringMatching(message), exit]);
    expect(trouble.fix).toBeTruthy();
    expect(existsSync(out)).toBe(false);
  });

  test("no xz", async () => {
    const { PATH } = process.env;
    process.env.PATH = join(work, "nothing");
    try {
      const trouble = await troubleOf(pack({ plan, out }));
      expect([trouble.message, trouble.exit]).toEqual(["xz is not installed: it compresses the archive", 3]);
    } finally {
      process.env.PATH = PATH;
    }
    expect(readdirSync(work).filter((name) => name.startsWith("no.tar"))).toEqual([]);
  });
});
