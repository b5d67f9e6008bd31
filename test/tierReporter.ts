/**
 * Reports what the tier left out, and fails a run of the fast tier in which every test of a file has the tag `full`: each file is a
 * family of proof, and the fast tier has a representative of each.
 */
import { basename } from "node:path";
import type { Reporter, TestModule } from "vitest/node";
import { isFull } from "./tiers.ts";

export class TierReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[]): void {
    if (isFull) return;
    const files = modules.map((m) => {
      const tests = [...m.children.allTests()];
      const left = tests.filter((t) => t.tags.includes("full"));
      return { name: basename(m.moduleId), tests: tests.length, left: left.length };
    });
    const left = files.reduce((n, f) => n + f.left, 0);
    if (left > 0) console.log(`\nFast tier: npm run test:full runs ${left} more tests, and more draws and sizes of others.`);
    const empty = files.filter((f) => f.tests > 0 && f.tests === f.left).map((f) => f.name);
    if (empty.length === 0) return;
    console.error(`No test of ${empty.join(", ")} runs in the fast tier: leave one without the tag full.`);
    process.exitCode = 1;
  }
}
