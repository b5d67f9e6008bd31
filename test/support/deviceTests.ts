/**
 * The tests that need a GPU, on this machine's: `npm run test:cuda`, `npm run test:webgpu`. Runs them, and writes what passed to
 * test/results/<kind>-tests-<date>.md, with the device, its driver and the command. Exits 1 if any failed, or if none ran.
 */
import { spawn, spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { basename, join } from "node:path";
import { opNames } from "../../schemas/opNames.ts";
import { root } from "./checkout.ts";

/** A run of vitest: files, and the names of their tests as a regular expression. */
interface Part {
  readonly files: readonly string[];
  readonly only: string;
}
interface Kind {
  readonly env: Readonly<Record<string, string>>;
  /** Runs side by side: the references on the CPU take longer than the kernels. */
  readonly together: readonly Part[];
  /** Runs one after another, with the device to themselves: they measure its memory, or use all of it. */
  readonly alone: readonly Part[];
}

/** The tests of the contract in so many runs. */
const SHARES = Math.max(1, Math.min(6, Math.floor(availableParallelism() / 2)));
const contract = Array.from({ length: SHARES }, (_, n): Part => {
  const ops = opNames.filter((__, i) => i % SHARES === n);
  return { files: ["cuda-contract"], only: `on a device.* (${ops.join("|")}) does what` };
});
const memory = "a rank allocates the memory of its plan";
const kinds: Readonly<Record<string, Kind>> = {
  cuda: {
    env: {},
    together: [
      ...contract,
      { files: ["cuda-tensor-lists"], only: "on a device" },
      { files: ["cuda-attention", "cuda-gemm-tf32"], only: "on this machine's GPU" },
      { files: ["cuda-device"], only: `on this machine's GPU(?!.*${memory})` },
      { files: ["cuda-reference"], only: "on a device" },
    ],
    alone: [
      { files: ["cuda-device"], only: memory },
      { files: ["doctor"], only: "(a GPU |an all-reduce)" },
    ],
  },
  webgpu: {
    env: { RANKC_WEBGPU: "hardware" },
    together: [],
    alone: [{ files: ["wgsl-contract", "webgpu-collectives", "webgpu-device", "webgpu-run"], only: "." }],
  },
};

interface Outcome {
  readonly name: string;
  readonly assertionResults: readonly { readonly fullName: string; readonly status: string; readonly duration?: number }[];
}

const [kind = ""] = process.argv.slice(2);
const chosen = kinds[kind];
if (!chosen) throw new Error(`name one of ${Object.keys(kinds).join(", ")}`);
const { env, together, alone } = chosen;
const folder = mkdtempSync(join(tmpdir(), "rankc-device-tests-"));

/** Runs vitest and returns its outcomes by file; none if it wrote no report. */
function outcomesOf({ files, only }: Part, name: string): Promise<readonly Outcome[]> {
  const json = join(folder, `${name}.json`);
  const command = ["node_modules/vitest/vitest.mjs", "run", ...files, "-t", only, "--testTimeout", "300000", "--reporter=default"];
  const child = spawn(process.execPath, [...command, "--reporter=json", `--outputFile=${json}`], {
    cwd: root,
    stdio: "inherit",
    env: { ...process.env, RANKC_TEST: "full", ...env },
  });
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("exit", () => {
      try {
        resolve((JSON.parse(readFileSync(json, "utf8")) as { readonly testResults: readonly Outcome[] }).testResults);
      } catch (error) {
        reject(new Error(`the tests of ${files.join(", ")} wrote no report: ${(error as Error).message}`));
      }
    });
  });
}

const outcomes = (await Promise.all(together.map((part, n) => outcomesOf(part, `together-${n}`)))).flat();
for (const [n, part] of alone.entries()) outcomes.push(...(await outcomesOf(part, `alone-${n}`)));
rmSync(folder, { recursive: true });
const ran = outcomes.flatMap((f) =>
  f.assertionResults.filter((t) => t.status === "passed" || t.status === "failed").map((t) => ({ file: basename(f.name), ...t })),
);
const failed = ran.filter((t) => t.status === "failed");
const smi = spawnSync("nvidia-smi", ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], { encoding: "utf8" });
const date = new Date().toISOString().slice(0, 10);
const text = `# Tests on a GPU: ${kind}

${date}, ${smi.stdout?.trim().replaceAll("\n", "; ") || "no nvidia-smi"}, Node ${process.version}. \`npm run test:${kind}\`: ${ran.length - failed.length} passed, ${failed.length} failed.

| file | test | result | ms |
|---|---|---|---|
${ran.map((t) => `| ${t.file} | ${t.fullName.replaceAll("|", "\\|")} | ${t.status} | ${Math.round(t.duration ?? 0)} |`).join("\n")}
`;
const results = process.env.RANKC_RESULTS ?? join(root, "test/results");
mkdirSync(results, { recursive: true });
writeFileSync(join(results, `${kind}-tests-${date}.md`), text);
process.stdout.write(`${ran.length - failed.length} passed, ${failed.length} failed\n`);
if (failed.length || !ran.length) process.exitCode = 1;
