import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, it } from "vitest";
import { benchCases } from "../bench/cudaBenchCases.ts";
import { root } from "../support/checkout.ts";

/** The bench finds what checks a case and what it is compared with by the kind of the case, at run time, on a GPU. */
it("every case of bench:cuda has a reference and peers in Python", () => {
  const python = readFileSync(join(root, "test/bench/cuda_bench_torch.py"), "utf8");
  const has = (name: string): boolean => new RegExp(`\\b${name}\\b( =|\\(self)`).test(python);
  const kinds = [...new Set(benchCases(/(?:)/).map((c) => c.kind))];
  expect(kinds.length).toBeGreaterThan(20);
  expect(kinds.filter((kind) => !has(`reference_${kind}`))).toEqual([]);
  expect(kinds.filter((kind) => !has(`peers_${kind}`))).toEqual([]);
});
