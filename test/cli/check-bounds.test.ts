/** `check` answers any text of up to 1 MiB within two seconds of CPU, with findings and without an exception. */
import { expect, test } from "vitest";
import { hasErrors, renderFindings, SHOWN, shown } from "../../src/frontend/diagnostic.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";

const MIB = 2 ** 20;
interface Over {
  readonly layers?: number;
  readonly width?: number;
  readonly model?: string;
  readonly parallel?: string;
  readonly train?: string;
}
const job = ({ layers = 4, width = 64, model = "", parallel = "{}", train = "" }: Over) => `name: bounds
model: {layers: ${layers}, hidden: ${width}, heads: 4, vocab: 256, seq: ${width}, ${model}}
parallel: ${parallel}
train: {steps: 10, ${train} optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`;
const moe = (layers: string) => `moe: {experts: 4, top_k: 2, ffn: 64, router: {aux_coeff: 0.01}, layers: ${layers}}`;
/** Layers with and without experts in an order that repeats nothing. */
const irregular = (n: number): string => `[${Array.from({ length: n }, (_, i) => (Math.imul(i + 1, 0x9e3779b1) >>> 31) & 1)}]`;
const avalanche = (bytes: number): string => `  a: 1\nb: 2\n${"- 1\n".repeat(bytes / 4)}`;
const unknown = (n: number): string => Array.from({ length: n }, (_, i) => `k${i}: 1`).join(", ");

test.each([
  ["pipeline 65537 of world 4", job({ parallel: "{world: 4, pipeline: 65537}" }), "P101"],
  [
    "more blocks than a plan lists",
    job({ layers: 1024, parallel: "{world: 1024, pipeline: 1024}", train: "global_batch: 65536," }),
    "B237",
  ],
  [
    "a pipeline of 1,024 stages for few microbatches",
    job({ layers: 1024, parallel: "{world: 1024, pipeline: 1024}", train: "global_batch: 100," }),
    "P108",
  ],
  ["600 layers, three of them dense", job({ layers: 600, width: 4096, model: moe("{first_dense: 3}") }), "C510"],
  ["600 layers with and without experts in no order", job({ layers: 600, width: 4096, model: moe(irregular(600)) }), "C510"],
  ["4,096 layers", job({ layers: 4096, width: 4096 }), "C510"],
  ["too many layers", job({ layers: 65536 }), "S014"],
  ["a list of layers that is too long", job({ model: moe(`[${Array(300_000).fill(1)}]`) }), "S001"],
  ["1 MiB of list items", "- 1\n".repeat(MIB / 4), "S001"],
  ["1 MiB after a syntax error", avalanche(MIB - 100), "S001"],
  ["10,000 unknown keys", job({ model: unknown(10_000) }), "S010"],
  ["10,000 equal keys", "name: a\n".repeat(10_000), "S002"],
  ["1 MiB of brackets", `a: ${"[".repeat(MIB - 10)}`, "S001"],
  ["attention over 4,096 context ranks", job({ width: 8192, parallel: "{world: 4096, context: 4096}" }), "S014"],
  ["a layout whose repetitions are too long", job({ parallel: '{layout: "E(t*999999)*999999L"}' }), "P113"],
  ["a layout of 1 MiB", job({ parallel: `{layout: "${"(".repeat(MIB - 500)}"}` }), "S012"],
  ["a sequence beyond exact numbers", job({}).replace("seq: 64", "seq: 9007199254740991"), "M313"],
])("%s", (_, text, code) => {
  const before = process.cpuUsage();
  const { job: read, findings } = readJob(text, "job.yaml");
  const { user, system } = process.cpuUsage(before);
  expect(findings.map((f) => f.code)).toContain(code);
  expect(read === undefined).toBe(hasErrors(findings));
  expect((user + system) / 1e6).toBeLessThan(2);
  expect(renderFindings(findings, { color: false }).length).toBeLessThan(60_000);
});

test("the first findings are shown, and the others counted by code", () => {
  const { findings } = readJob(avalanche(2000), "job.yaml");
  expect(findings.length).toBeGreaterThan(450);
  const { findings: first, more } = shown(findings);
  expect(first).toEqual(findings.slice(0, SHOWN));
  expect(more).toEqual({ S001: findings.length - SHOWN });
  const text = renderFindings(findings, { color: false });
  expect(text.match(/^error/gm)).toHaveLength(SHOWN);
  expect(text).toContain(`… and ${findings.length - SHOWN} more: ${findings.length - SHOWN} x S001\n\n${findings.length} errors`);
});
