/**
 * Reports what the tier left out and which files took most CPU time. Warns if the fast tier exceeds its budget. Fails a run of the fast tier in which every test of a file has the
 * tag `full`: each file is a family of proof, and the fast tier has a representative of each.
 */
import { basename } from "node:path";
import type { Reporter, TestModule } from "vitest/node";
import { FAST_BUDGET, isFull } from "./tiers.ts";

/** How many files the report names. */
const NAMED = 12;

export class TierReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[]): void {
    const files = modules.map((m) => {
      const tests = [...m.children.allTests()];
      const left = tests.filter((t) => t.tags.includes("full")).length;
      return { name: basename(m.moduleId, ".test.ts"), tests: tests.length, left, cpu: m.meta().cpuSeconds ?? 0 };
    });
    const total = files.reduce((sum, f) => sum + f.cpu, 0);
    const most = files.toSorted((a, b) => b.cpu - a.cpu).slice(0, NAMED);
    console.log(`\nCPU seconds of test files: ${total.toFixed(0)}; ${most.map((f) => `${f.name} ${f.cpu.toFixed(1)}`).join(", ")}`);
    if (isFull) return;
    if (total > FAST_BUDGET)
      console.warn(
        `Warning: the fast tier has ${FAST_BUDGET} CPU seconds for its test files. Share what they compile, or give tests the tag full (docs/testing.md).`,
      );
    const left = files.reduce((n, f) => n + f.left, 0);
    if (left > 0) console.log(`Fast tier: npm run test:full runs ${left} more tests, and more draws and sizes of others.`);
    const empty = files.filter((f) => f.tests > 0 && f.tests === f.left).map((f) => f.name);
    if (empty.length === 0) return;
    console.error(`No test of ${empty.join(", ")} runs in the fast tier: leave one without the tag full.`);
    process.exitCode = 1;
  }
}
