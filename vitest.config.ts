/** How the tests run: a file for each core at a time, and patience for machines that are busy with other things. */
import { defineConfig } from "vitest/config";

export default defineConfig({ test: { maxWorkers: "100%", testTimeout: 60_000, hookTimeout: 60_000 } });
