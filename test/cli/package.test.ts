/** The package: packed and installed in an empty folder, it gives a working `rankc`. */
import { execFileSync } from "node:child_process";
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { copyCheckout, root } from "../support/checkout.ts";
import { full, isFull } from "../support/tiers.ts";

interface Lock {
  readonly packages: Readonly<Record<string, { readonly dev?: boolean; readonly dependencies?: object }>>;
}

const checkout = copyCheckout();
const home = mkdtempSync(join(tmpdir(), "rankc-installed-"));
afterAll(() => [checkout, home].forEach((folder) => void rmSync(folder, { recursive: true, force: true })));

const npm = (cwd: string, ...args: string[]): string =>
  execFileSync("npm", args, { cwd, encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
/** In the fast tier the packages that rankc depends on are links to those of this checkout: npm takes seconds to copy them. */
function unpack(tarball: string, used: readonly string[]): void {
  const at = (...path: string[]): string => join(home, "node_modules", ...path);
  mkdirSync(at(".bin"), { recursive: true });
  execFileSync("tar", ["-xzf", join(home, tarball), "-C", home]);
  renameSync(join(home, "package"), at("rankc"));
  chmodSync(at("rankc/dist/cli/rankc.cjs"), 0o755);
  symlinkSync("../rankc/dist/cli/rankc.cjs", at(".bin/rankc"));
  for (const path of used) {
    const [, name = ""] = /^node_modules\/((?:@[^/]+\/)?[^/]+)$/.exec(path) ?? [];
    const own = join(root, "node_modules", name);
    // of packages for other systems there is none
    if (name === "" || !existsSync(own)) continue;
    mkdirSync(dirname(at(name)), { recursive: true });
    symlinkSync(own, at(name));
  }
}
/** In the fast tier the build leaves out what other tests have made: types are checked, and the pages bundled. Declarations need the types. */
function shortenBuild(): void {
  const file = join(checkout, "package.json");
  const text = readFileSync(file, "utf8");
  const pages = / && vite build -c (?:runtime\/browser|src\/page)\/vite\.config\.ts --logLevel warn/g;
  expect(text.match(pages)).toHaveLength(2);
  expect(text).toContain("tsc -p tsconfig.build.json &&");
  writeFileSync(file, text.replaceAll(pages, "").replace("tsconfig.build.json &&", "tsconfig.build.json --noCheck --declaration false &&"));
}
const env = { ...process.env, XDG_CACHE_HOME: join(home, "cache") };
const rankc = (...args: string[]): string =>
  execFileSync(join(home, "node_modules/.bin/rankc"), args, { cwd: home, env, encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });

/** Folders of the caches of other builds, the oldest first. */
const builds = ["a", "b", "c", "d"].map((name) => join(home, "cache/rankc", `results-${name}`));

beforeAll(() => {
  for (const [age, folder] of builds.entries()) {
    mkdirSync(folder, { recursive: true });
    utimesSync(folder, 1000 + age, 1000 + age);
  }
  if (!isFull) shortenBuild();
  npm(checkout, "pack", "--pack-destination", home, "--loglevel=error");
  const tarball = readdirSync(home).find((name) => name.endsWith(".tgz"))!;
  // with the versions of this checkout's lock file, npm needs its cache and no network
  const { packages } = JSON.parse(readFileSync(join(checkout, "package-lock.json"), "utf8")) as Lock;
  const used = Object.fromEntries(Object.entries(packages).filter(([path, entry]) => path !== "" && !entry.dev));
  if (!isFull) return unpack(tarball, Object.keys(used));
  const rankcEntry = {
    version: "0.1.0",
    resolved: `file:${tarball}`,
    bin: { rankc: "dist/cli/rankc.cjs" },
    dependencies: packages[""]!.dependencies,
  };
  const dependencies = { rankc: `file:${tarball}` };
  writeFileSync(join(home, "package.json"), JSON.stringify({ name: "home", private: true, dependencies }));
  writeFileSync(
    join(home, "package-lock.json"),
    JSON.stringify({
      name: "home",
      lockfileVersion: 3,
      packages: { "": { name: "home", dependencies }, "node_modules/rankc": rankcEntry, ...used },
    }),
  );
  npm(home, "ci", "--prefer-offline", "--no-audit", "--no-fund", "--loglevel=error");
});

describe("the installed package", () => {
  const job = "node_modules/rankc/plans/tiny-dense/job.yaml";

  test("contains what it needs; no sources, tests or tools", () => {
    expect(readdirSync(join(home, "node_modules/rankc")).sort()).toEqual([
      "LICENSE",
      "README.md",
      "dist",
      "package.json",
      "plans",
      "schemas",
      "templates",
    ]);
    expect(existsSync(join(home, "node_modules/rankc/dist/test"))).toBe(false);
    expect(existsSync(join(home, "node_modules/typescript"))).toBe(false);
  });

  test("works where the folder of the cache cannot be created", () => {
    const options = { cwd: home, env: { ...env, XDG_CACHE_HOME: "/proc/cache" }, encoding: "utf8", timeout: 30_000 } as const;
    expect(execFileSync(join(home, "node_modules/.bin/rankc"), ["check", job], options)).toContain("valid");
  });

  test("names its version, checks a job, compiles it and reads the plan back", () => {
    expect(rankc("--version")).toBe("0.1.0\n");
    expect(rankc("check", job)).toContain("valid");
    rankc("compile", job, "-o", "plan");
    expect(readdirSync(join(home, "plan")).sort()).toEqual(["data_dir.txt", "plan.json", "plan.txt"]);
    expect(rankc("inspect", "plan")).toContain("tiny-dense");
  });

  test("holds the built validator of plans, which refuses a key that is not of the schema", () => {
    expect(existsSync(join(home, "node_modules/rankc/dist/src/plan/planValidator.cjs"))).toBe(true);
    const file = join(home, "plan/plan.json");
    writeFileSync(file, readFileSync(file, "utf8").replace(',"format_version"', ',"extra":1,"format_version"'));
    expect(() => rankc("inspect", "plan")).toThrow(
      "another build of rankc wrote this plan (it names 0.1.0, this is 0.1.0): the plan must NOT have additional properties",
    );
  });

  const ownResults = (): string => {
    const [folder] = readdirSync(join(home, "cache/rankc")).filter((name) => name.length > "results-a".length);
    return join(home, "cache/rankc", folder!);
  };

  test("removes the caches of older builds, except the newest two", () => {
    expect(builds.map((folder) => existsSync(folder))).toEqual([false, false, true, true]);
  });

  test("keeps the code that V8 compiled; damaged code changes nothing", () => {
    const code = (): string[] => readdirSync(ownResults()).filter((name) => name.startsWith("code-"));
    expect(code().length).toBeGreaterThan(10);
    for (const name of code()) writeFileSync(join(ownResults(), name), "damaged");
    expect(rankc("check", job)).toContain("valid");
    expect(code().some((name) => readFileSync(join(ownResults(), name), "latin1") !== "damaged")).toBe(true);
  });

  test("remembers the estimate of a plan: the second report is the first, and damage to the cache changes nothing", () => {
    rankc("compile", job, "-o", "timed");
    const report = (): string => rankc("inspect", "timed", "--device", "h100-80gb", "--format", "json");
    const first = report();
    expect(JSON.parse(first).estimate.seconds).toBeGreaterThan(0);
    const estimates = readdirSync(ownResults()).filter((name) => name.startsWith("estimate-"));
    expect(estimates).toHaveLength(1);
    expect(report()).toBe(first);
    const kept = join(ownResults(), estimates[0]!);
    writeFileSync(kept, readFileSync(kept, "utf8").replace(/"busiest":0/, '"busiest":7'));
    expect(JSON.parse(report()).estimate.busiest).toBe(7);
    writeFileSync(kept, "{");
    expect(report()).toBe(first);
  });

  test(
    "remembers peaks, checked plans and compiled plans: an answer from the cache is the computed one, and damage to the cache changes nothing",
    full,
    () => {
      const large = "node_modules/rankc/plans/mixtral-8x7b-16gpu/job.yaml";
      const sets = ["--set", "cluster.device=h100-80gb", "--format", "json"];
      const first = rankc("check", large, ...sets);
      const results = ownResults();
      const peaks = readdirSync(results).filter((name) => name.startsWith("peak-"));
      expect(peaks.length).toBeGreaterThan(0);
      expect(readdirSync(results).filter((name) => name.startsWith("plan-"))).toHaveLength(1);
      expect(rankc("check", large, ...sets)).toBe(first);
      for (const name of peaks) writeFileSync(join(results, name), "{");
      expect(rankc("check", large, ...sets)).toBe(first);

      const compiled = (): string[] => readdirSync(results).filter((name) => name.startsWith("compiled-"));
      rankc("compile", large, "-o", "large");
      expect(compiled()).toHaveLength(1);
      rankc("compile", large, "-o", "again");
      for (const name of ["plan.json", "plan.txt"])
        expect(readFileSync(join(home, "again", name), "utf8")).toBe(readFileSync(join(home, "large", name), "utf8"));
      expect(rankc("compile", large, "-o", "again", "--check")).toContain("again is current");
      for (const name of compiled()) writeFileSync(join(results, name), "damaged");
      expect(rankc("compile", large, "-o", "again", "--check")).toContain("again is current");
    },
  );

  test("trains a step", () => {
    expect(rankc("run", job, "--steps", "1")).toMatch(/^1 steps? in .* loss 5\.\d+/);
  });

  test("is a library: the example of docs/library.md runs, and in the full tier type-checks", () => {
    const [, example] = /^```ts\n([\s\S]*?)^```$/m.exec(readFileSync(join(checkout, "docs/library.md"), "utf8")) ?? [];
    writeFileSync(join(home, "example.mts"), example!);
    cpSync(join(checkout, "plans/tiny-mixtral/corpus.txt"), join(home, "corpus.txt"));
    const tsc = join(checkout, "node_modules/typescript/bin/tsc");
    const types = join(checkout, "node_modules/@types");
    const options = ["--module", "nodenext", "--target", "es2022", "--strict", "--skipLibCheck", "--types", "node", "--typeRoots", types];
    execFileSync(process.execPath, [tsc, ...options, ...(isFull ? [] : ["--noCheck"]), "example.mts"], { cwd: home, encoding: "utf8" });
    expect(execFileSync(process.execPath, ["example.mjs"], { cwd: home, encoding: "utf8" })).toMatch(/tp[\s\S]*\n5\.\d\d\n$/);
  });

  test("finds its templates and schemas", () => {
    expect(rankc("explain", "P104")).toContain("P104");
    expect(JSON.parse(rankc("schema"))).toMatchObject({ title: "rankc job" });
  });
});
