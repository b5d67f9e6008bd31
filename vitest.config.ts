/** How the tests run: by tier (test/tiers.ts), the longest files first, and as many files as there are cores at a time. */
import { basename } from "node:path";
import { defineConfig } from "vitest/config";
import { BaseSequencer, type TestSpecification } from "vitest/node";
import { TierReporter } from "./test/tierReporter.ts";
import { isFull } from "./test/tiers.ts";

/** Files that start first, so that no core waits for one of them at the end. A fresh clone has no recorded durations. */
const longest = [
  "cuda-compile",
  "cuda-contract",
  "wgsl-contract",
  "cuda-whole",
  "webgpu-run",
  "oracles",
  "cuda-gemm",
  "readme",
  "mesh-law",
];

/** Files that change their process (mocks, environment variables, signal handlers, devices) run in a process of their own. */
const alone = ["cuda-*", "wgsl-*", "webgpu-*", "browser", "doctor", "oracles", "snapshot"].map((name) => `test/${name}.test.ts`);

class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const rank = ({ moduleId, project }: TestSpecification): number => {
      const at = longest.indexOf(basename(moduleId, ".test.ts"));
      // a worker is kept only while the next file is of the project `together`
      return (project.name === "alone" ? 0 : 100) + (at < 0 ? longest.length : at);
    };
    return (await super.sort(files)).sort((a, b) => rank(a) - rank(b));
  }
}

/** A limit against hangs alone: 20 times what the longest test of the tier takes on an idle machine. */
const HANG = isFull ? 3_600_000 : 600_000;

export default defineConfig({
  test: {
    maxWorkers: "100%",
    testTimeout: HANG,
    hookTimeout: HANG,
    tags: [{ name: "full", description: "runs in the full tier alone" }],
    ...(isFull ? {} : { tagsFilter: ["!full"] }),
    reporters: ["default", new TierReporter()],
    setupFiles: ["test/setup.ts"],
    sequence: { sequencer: LongestFirst },
    projects: [
      { extends: true, test: { name: "alone", include: alone } },
      { extends: true, test: { name: "together", include: ["test/*.test.ts"], exclude: alone, isolate: false } },
    ],
  },
});
