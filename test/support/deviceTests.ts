/**
 * The tests that need a GPU, on this machine's: `npm run test:cuda`, `npm run test:webgpu`. Runs them, and writes what passed to
 * test/results/<kind>-tests-<date>.md, with the device, its driver and the command. Exits 1 if any failed, or if none ran.
 */
import { spawnSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { root } from "./checkout.ts";

const kinds = {
  cuda: {
    files: ["cuda-contract", "cuda-attention", "cuda-device", "cuda-reference", "doctor"],
    only: "(on a device|on this machine's GPU|a GPU |an all-reduce)",
    env: {},
  },
  webgpu: { files: ["wgsl-contract", "webgpu-collectives", "webgpu-device", "webgpu-run"], only: ".", env: { RANKC_WEBGPU: "hardware" } },
} as const;

interface Outcome {
  readonly name: string;
  readonly assertionResults: readonly { readonly fullName: string; readonly status: string; readonly duration?: number }[];
}

const kind = process.argv[2] as keyof typeof kinds;
const { files, only, env } = kinds[kind];
const json = join(tmpdir(), `rankc-${kind}-${process.pid}.json`);
const command = ["node_modules/vitest/vitest.mjs", "run", ...files, "-t", only, "--testTimeout", "300000", "--reporter=default"];
spawnSync(process.execPath, [...command, "--reporter=json", `--outputFile=${json}`], {
  cwd: root,
  stdio: "inherit",
  env: { ...process.env, RANKC_TEST: "full", ...env },
});
const { testResults } = JSON.parse(readFileSync(json, "utf8")) as { readonly testResults: readonly Outcome[] };
const ran = testResults.flatMap((f) =>
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
const folder = process.env.RANKC_RESULTS ?? join(root, "test/results");
mkdirSync(folder, { recursive: true });
writeFileSync(join(folder, `${kind}-tests-${date}.md`), text);
process.stdout.write(`${ran.length - failed.length} passed, ${failed.length} failed\n`);
if (failed.length || !ran.length) process.exitCode = 1;
