/** How the tests run: a file for each core at a time, and patience for machines that are busy with other things. */
import { basename } from "node:path";
import { defineConfig } from "vitest/config";
import { BaseSequencer, type TestSpecification } from "vitest/node";

/** They begin first, so that no core waits for one of them at the end. A fresh clone knows no durations. */
const longest = ["cuda-compile", "cuda-contract", "wgsl-contract", "reference", "rendezvous", "mesh-law", "readme", "cuda-gemm", "browser"];

class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const place = ({ moduleId }: TestSpecification): number => {
      const at = longest.indexOf(basename(moduleId, ".test.ts"));
      return at < 0 ? longest.length : at;
    };
    return (await super.sort(files)).sort((a, b) => place(a) - place(b));
  }
}

export default defineConfig({
  test: { maxWorkers: "100%", testTimeout: 60_000, hookTimeout: 60_000, sequence: { sequencer: LongestFirst } },
});
