/** How the tests run: by tier (test/support/tiers.ts), the longest files first. */
import { readdirSync, readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { basename, join } from "node:path";
import { defineConfig } from "vitest/config";
import { BaseSequencer, type TestSpecification } from "vitest/node";
import { TierReporter } from "./test/support/tierReporter.ts";
import { isFull, longestFiles } from "./test/support/tiers.ts";

/** Files that mock modules, load stand-in libraries, or open a WebGPU device or a browser run in a process of their own; others share one for each core. */
const needsProcess = /\bvi\.mock\(|\/(softwareAdapter|chromium|cudaStandIn|cudaRanks)\.ts"|from "webgpu"/;
const alone = readdirSync("test", { recursive: true, encoding: "utf8" })
  .map((path) => join("test", path))
  .filter((path) => path.endsWith(".test.ts") && needsProcess.test(readFileSync(path, "utf8")));

class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const rank = ({ moduleId, project }: TestSpecification): number => {
      const at = longestFiles.indexOf(basename(moduleId, ".test.ts"));
      // a worker is kept only while the next file is of the project `together`
      return (project.name === "alone" ? 0 : 100) + (at < 0 ? longestFiles.length : at);
    };
    return (await super.sort(files)).sort((a, b) => rank(a) - rank(b));
  }
}

/** A limit against hangs alone, in milliseconds: far beyond the longest test on a machine that does much else. */
const HANG = 3_600_000;

export default defineConfig({
  test: {
    // some tests wait for processes: one more worker than cores uses the time
    maxWorkers: availableParallelism() + 1,
    testTimeout: HANG,
    hookTimeout: HANG,
    tags: [{ name: "full", description: "runs in the full tier alone" }],
    ...(isFull ? {} : { tagsFilter: ["!full"] }),
    reporters: ["default", new TierReporter()],
    // what a file of TypeScript was transformed to stays below node_modules until the file changes
    experimental: { fsModuleCache: true },
    setupFiles: ["test/support/setup.ts"],
    // in group 0 vitest moves isolated files behind all others if there is one worker
    sequence: { sequencer: LongestFirst, groupOrder: 1 },
    projects: [
      { extends: true, test: { name: "alone", include: alone } },
      { extends: true, test: { name: "together", include: ["test/**/*.test.ts"], exclude: alone, isolate: false } },
    ],
  },
});
