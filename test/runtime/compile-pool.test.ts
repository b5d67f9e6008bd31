import { afterAll, expect, test } from "vitest";
import { openCompilePool } from "../../runtime/cuda/compilePool.ts";
import { nvrtcVersion } from "../../runtime/cuda/nvrtc.ts";

const pool = openCompilePool(1);
afterAll(() => pool.close());

const hasNvrtc = ((): boolean => {
  try {
    return nvrtcVersion().version !== "";
  } catch {
    return false;
  }
})();

/** The options of a test runner belong to its own processes; a compiling process that takes them ends at once. */
test("a process of the pool starts from a test, and returns what NVRTC returns or that it is missing", async () => {
  const source = 'extern "C" __global__ void nothing() {}';
  const image = pool.compile(source, { arch: "compute_80", name: "nothing.cu" });
  if (hasNvrtc) expect((await image).length).toBeGreaterThan(0);
  else await expect(image).rejects.toThrow(/nvrtc/i);
});
