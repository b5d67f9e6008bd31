/**
 * The bench: seconds to compile and bytes of the plan over ranks and over layers, GFLOP/s of the reference product of matrices.
 * JSON to stdout. Each figure is the median of runs that alternate with those it is compared with.
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { compile } from "../../src/compile.ts";
import { gemm } from "../../src/ops/matrixProduct.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { root } from "../support/checkout.ts";
import { deepseekSets, scaledJob } from "../support/scale.ts";

const RUNS = 5;

const median = (numbers: readonly number[]): number => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)]!;
const round = (n: number, digits = 3): number => Number(n.toFixed(digits));

function seconds(work: () => void): number {
  const start = performance.now();
  work();
  return (performance.now() - start) / 1000;
}

/** Runs each once, then RUNS rounds over all; each round begins with another, because one run may pay for the garbage collection of the run before. */
function alternate(works: readonly (() => void)[]): number[] {
  for (const work of works) work();
  const times = works.map((): number[] => []);
  for (let round = 0; round < RUNS; round++)
    for (let i = 0; i < works.length; i++) {
      const at = (round + i) % works.length;
      times[at]!.push(seconds(works[at]!));
    }
  return times.map(median);
}

function compiles(sizes: readonly { ranks?: number; layers?: number }[]) {
  const jobs = sizes.map(scaledJob);
  const bytes = jobs.map((job) => Buffer.byteLength(printPlan(compile(job).plan)));
  const times = alternate(jobs.map((job) => () => void printPlan(compile(job).plan)));
  const rows = sizes.map((size, i) => ({ ...size, seconds: round(times[i]!), plan_bytes: bytes[i]! }));
  const growth = { seconds: round(times.at(-1)! / times[0]!), plan_bytes: round(bytes.at(-1)! / bytes[0]!) };
  return { rows, growth };
}

/** The whole command, from the sources: seconds, the process's memory at its largest, the plan's size. */
function commands() {
  const folder = mkdtempSync(join(tmpdir(), "rankc-bench-"));
  const sizes = [2048, 16384];
  const memory = join(folder, "memory.mjs");
  writeFileSync(
    memory,
    'import { writeFileSync } from "node:fs";\nprocess.on("exit", () => writeFileSync(process.env.RANKC_MEMORY, String(process.resourceUsage().maxRSS)));\n',
  );
  const found = join(folder, "memory");
  const compileAt = (ranks: number, into: string) => {
    const sets = Object.entries(deepseekSets(ranks)).flatMap(([key, value]) => ["--set", `${key}=${value}`]);
    const args = [
      "--import",
      "tsx",
      "--import",
      memory,
      "src/cli/main.ts",
      "compile",
      "plans/deepseek-v3-1024gpu/job.yaml",
      "-o",
      into,
      ...sets,
    ];
    execFileSync(process.execPath, args, { cwd: root, stdio: "ignore", env: { ...process.env, RANKC_MEMORY: found } });
  };
  const peaks = sizes.map(() => 0);
  const works = sizes.map((ranks, i) => () => {
    compileAt(ranks, join(folder, String(ranks)));
    peaks[i] = Math.max(peaks[i]!, Number(readFileSync(found, "utf8")) / 1024);
  });
  const times = alternate(works);
  const rows = sizes.map((ranks, i) => ({
    ...{ ranks, seconds: round(times[i]!, 2), memory_mib: Math.round(peaks[i]!) },
    plan_bytes: statSync(join(folder, String(ranks), "plan.json")).size,
  }));
  rmSync(folder, { recursive: true });
  return rows;
}

function products() {
  const variants = { nn: {}, nt: { tb: true }, tn: { ta: true } };
  const cases = [256, 512].flatMap((size) => Object.entries(variants).map(([variant, turned]) => ({ size, variant, turned })));
  const works = cases.map(({ size, turned }) => {
    const [a, b, c] = [1, 2, 3].map((seed) => Float32Array.from({ length: size * size }, (_, i) => Math.sin(seed * i)));
    return () => gemm(c!, a!, b!, { m: size, n: size, k: size, ...turned });
  });
  const times = alternate(works);
  return cases.map(({ size, variant }, i) => ({ size, variant, gflops: round((2 * size ** 3) / times[i]! / 1e9, 2) }));
}

const report = {
  machine: { node: process.version, cpu: cpus()[0]?.model, cores: cpus().length },
  runs: RUNS,
  ranks: compiles([16, 64, 256, 1024, 4096, 16384].map((ranks) => ({ ranks }))),
  layers: compiles([4, 8, 16, 32, 64, 128].map((layers) => ({ layers }))),
  deepseek_v3: commands(),
  gemm_f32: products(),
};
process.stdout.write(`${JSON.stringify(report, null, 2)}\n`);
