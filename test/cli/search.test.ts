/** `rankc search`: the fastest choice that fits, which rules allow, and the error if none fits. */
import { expect, test } from "vitest";
import { deviceOf } from "../../schemas/devices.ts";
import { estimate } from "../../src/analysis/estimate/estimate.ts";
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { textWidth } from "../../src/report/textLayout.ts";
import { peakOf } from "../../src/rules/all.ts";
import { asInJob, choicesOf, type JobChoice, jobWith, settingsOf, variantsOf } from "../../src/search/choice.ts";
import { alternativesOf, frontOf, search } from "../../src/search/search.ts";
import { printSearch } from "../../src/search/searchText.ts";
import { jobOf } from "../support/job.ts";
import { rankc } from "../support/rankc.ts";

const text = `
name: small
model: {layers: 4, hidden: 1024, ffn: 2048, heads: 8, vocab: 4096, seq: 1024, moe: {experts: 8, top_k: 2, ffn: 1024, rows_bound: 2}}
parallel: {world: 4}
train: {global_batch: 32, steps: 10, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
cluster: {nodes: 1, gpus_per_node: 8, device: h100-80gb}
`;
const { job } = readJob(text, "small.yaml", []);
if (!job) throw new Error("the job of the test is invalid");
const profile = packageProfile("h100-80gb");
if (!profile) throw new Error("there is no profile of the H100");

test("the first choice is the fastest of all that rules allow, and what it prints compiles to the same step", () => {
  // few enough to compile all of them
  const fixed = { micro_batch: 1, context: 1, recompute: "none", virtual_pipeline: 1, tensor: 1, gradient_bucket: "job" } as const;
  const ways = [...choicesOf(job, fixed)].flatMap((choice) => [
    choice,
    ...variantsOf(job, choice, fixed).map(({ key, value }) => ({ ...choice, [key]: value })),
  ]);
  const all = ways.flatMap((choice) => {
    const candidate = readJob(text, "small.yaml", settingsOf(job, choice)).job;
    return candidate ? [estimate(compile(candidate).plan, { profile }).seconds] : [];
  });
  expect(all.length).toBeGreaterThan(5);
  const lines: string[] = [];
  const result = search(job, { profile, fixed, onProgress: (line) => lines.push(line) });
  const [best] = result.best;
  expect(best?.seconds).toBe(Math.min(...all));
  expect(lines.length).toBe(result.best.length);
  for (const { choice, peak } of result.best) {
    expect(choice).toMatchObject(fixed);
    expect(peak).toBe(peakOf(jobWith(job, choice)).bytes);
  }
  const front = frontOf(result.best);
  expect(front[0]).toBe(best);
  for (const [i, c] of front.entries()) if (i > 0) expect(c.peak).toBeLessThan(front[i - 1]?.peak ?? 0);
  for (const { saved } of alternativesOf(result.best)) expect(saved).toBeGreaterThanOrEqual(0);
  for (const line of printSearch(job, result, { top: 10, width: 80, fixed })) expect(textWidth(line), line).toBeLessThanOrEqual(80);
});

test("layers that stages cannot share evenly are spread by a layout, each once", () => {
  const uneven = { ...job, model: { ...job.model, layers: 7 }, parallel: { ...job.parallel, world: 8 } };
  const layouts = [...choicesOf(uneven, { tensor: 1, context: 1, micro_batch: 1, expert: 1 })].map(
    (c) => jobWith(uneven, c).parallel.layout,
  );
  const written = layouts.filter((layout) => layout !== null);
  expect(written.length).toBeGreaterThan(0);
  for (const layout of written) {
    const whole = layout.replace(/\(([^)]*)\)\*(\d+)/g, (_, part: string, n: string) => part.repeat(Number(n)));
    const places = whole.replace(/t\*(\d+)/g, (_, n: string) => "t".repeat(Number(n))).replaceAll("|", "");
    expect(places).toBe("EtttttttL");
  }
});

test("where nothing fits, the least memory, the given keys and the ways out are named", async () => {
  const big = jobOf({
    ...{ name: "big", model: { layers: 8, hidden: 8192, heads: 64, ffn: 28672, vocab: 32000, seq: 2048 } },
    ...{ parallel: { world: 1 }, train: { global_batch: 8, steps: 1, optimizer: { lr: 1e-3 } }, data: { path: "corpus.txt" } },
    cluster: { nodes: 1, gpus_per_node: 8, device: "h100-80gb" },
  });
  const result = search(big, { profile, fixed: { recompute: "full" }, plans: 2 });
  expect(result.best).toEqual([]);
  const printed = printSearch(big, result, { top: 3, width: 80, fixed: { recompute: "full" } }).join("\n");
  expect(printed.replace(/\s+/g, " ")).toMatch(
    /nothing fits: the least memory found is 1\d\d(\.\d)? GiB, and the device has 80\.0 GiB, of which the driver and NCCL need 768\.0 MiB/,
  );
  // eight layers of 8,192 need more than one device, whatever is recomputed
  expect(result.conflict?.keys).toEqual([]);
  expect(printed).toMatch(/fits on [248] ranks \(--gpus [248]\): \d+(\.\d)? GiB/);
});

test("where given keys alone exclude all, the fewest of them that conflict are named, and what fits without each", () => {
  const deep = jobOf({
    ...{ name: "deep", model: { layers: 32, hidden: 4096, heads: 32, ffn: 14336, vocab: 32000, seq: 8192 }, parallel: { world: 8 } },
    ...{ train: { global_batch: 8, steps: 1, optimizer: { lr: 1e-3 } }, data: { path: "corpus.txt" } },
    cluster: { nodes: 1, gpus_per_node: 8, device: "h100-80gb" },
  });
  const fixed = { micro_batch: 1, context: 1, tensor: 1, pipeline: 1, recompute: "none" } as const;
  const { conflict, best } = search(deep, { profile, fixed, plans: 1 });
  expect(best).toEqual([]);
  expect(conflict?.keys.length).toBeGreaterThan(1);
  expect(conflict?.keys).not.toContain("micro_batch");
  for (const { change, peak } of conflict?.waysOut ?? []) {
    if ("leaveOut" in change) expect(conflict?.keys).toContain(change.leaveOut);
    expect(peak).toBeLessThanOrEqual(80 * 2 ** 30);
  }
  expect(conflict?.waysOut.some(({ change }) => "leaveOut" in change)).toBe(true);
});

test("the command prints a table or JSON, and refuses unknown keys and devices without a profile", async () => {
  const path = "plans/tiny-mixtral/job.yaml";
  const fixes = ["--fix", "tensor=2", "--fix", "pipeline=1", "--fix", "context=1", "--fix", "micro_batch=1"];
  const out = await rankc("search", path, "--device", "h100-80gb", "--gpus", "4", "--plans", "2", "--format", "json", ...fixes);
  const { best, ranks } = JSON.parse(out.out);
  expect(ranks).toBe(4);
  expect(best.length).toBe(2);
  expect(best[0].choice).toMatchObject({ tensor: 2, pipeline: 1 });
  expect(best[0].set).toContain("parallel.tensor=2");
  expect((await rankc("search", path, "--fix", "speed=1", "--device", "h100-80gb")).err).toContain("search does not choose speed");
  expect((await rankc("search", path)).err).toContain("cpu has no device profile");
  expect((await rankc("search", path, "--device", "h9000")).err).toContain("there is no device h9000");
});

test("where the best beats the job as written, the changes that lead to it add up, and name groups that no longer cross nodes", () => {
  const written = {
    ...job,
    parallel: { ...job.parallel, world: 8, data: 8, expert: 8, distributed_optimizer: true },
    cluster: { ...job.cluster, gpus_per_node: 2, nodes: 4 },
  };
  const start = { ...written, parallel: { ...written.parallel, expert: 1 } };
  const fixed = { micro_batch: 1, context: 1, recompute: "none", tensor: 1, pipeline: 1, ...asInJob } as const;
  const result = search(start, { profile, fixed, written });
  const [best] = result.best;
  const steps = result.fromWritten ?? [];
  if (!best || !result.written) throw new Error("nothing was found");
  expect(best.choice.expert).toBeLessThan(8);
  expect(steps.at(-1)).toMatchObject({
    changes: [{ key: "expert", from: 8, to: best.choice.expert }],
    seconds: best.seconds,
    peak: best.peak,
  });
  expect(steps.reduce((sum, { saved }) => sum + saved, 0)).toBeCloseTo(result.written.seconds - best.seconds, 9);
  expect(steps.at(-1)?.part).toMatchObject({ name: "waits for ep" });
  const printed = printSearch(start, result, { top: 3, width: 80, fixed }).join("\n").replace(/\s+/g, " ");
  expect(printed).toContain("from the job as written to the first");
  expect(printed).toMatch(/expert 8 -> \d: .* less of waits for ep; expert groups of \d are inside a node, those of 8 on 4 nodes/);
});

test("software that sends rows once to a node and hides them makes groups over nodes cheaper, in the forecast and in the estimate", () => {
  const over = { ...job, parallel: { ...job.parallel, world: 8, data: 8 }, cluster: { ...job.cluster, gpus_per_node: 2, nodes: 4 } };
  const fixed = { micro_batch: 1, context: 1, recompute: "none", tensor: 1, pipeline: 1, expert: 8 } as const;
  const stack = packageProfile("h100-80gb.megatron");
  if (!stack) throw new Error("there is no profile of Megatron on the H100");
  const [plain] = search(over, { profile: stack, fixed }).best;
  const [assumed] = search(over, { profile: stack, fixed, assumed: { sendsPerNode: true, hidden: ["experts"] } }).best;
  expect(assumed?.choice).toEqual(plain?.choice);
  expect(assumed?.parts["waits for ep"]).toBeLessThan(plain?.parts["waits for ep"] ?? 0);
});

test("a plan leaves the device what the driver and NCCL need", () => {
  const fixed = { micro_batch: 1, context: 1, recompute: "none", virtual_pipeline: 1, tensor: 1, pipeline: 1 } as const;
  const [best] = search(job, { profile, fixed }).best;
  const reserve = 80 * 2 ** 30 - (best?.peak ?? 0) + 1;
  const tight = search(job, { profile, fixed, reserve });
  expect(tight.best.every(({ peak }) => peak < (best?.peak ?? 0))).toBe(true);
  expect(tight.memory + tight.reserve).toBe(80 * 2 ** 30);
});

test("bad input of a search is refused with its way out: a key named twice, a reserve that leaves nothing, degrees that divide nothing", async () => {
  const at = ["search", "plans/tiny-mixtral/job.yaml", "--gpus", "4", "--device", "h100-80gb"];
  expect((await rankc(...at, "--fix", "tensor=2", "--fix", "tensor=4")).err).toContain("--fix names tensor twice");
  expect((await rankc(...at, "--reserve", "100")).err).toContain("--reserve leaves nothing of the 80.0 GiB of h100-80gb");
  expect((await rankc(...at, "--reserve", "much")).err).toContain('--reserve is "much": write GiB, for example 2.5');
  const { out, exit } = await rankc(...at, "--fix", "tensor=3");
  expect(exit).toBe(1);
  expect((await rankc(...at, "--fix", "tensor=3", "--format", "json")).exit).toBe(1);
  const words = out.replace(/\s+/g, " ");
  expect(words).toContain("no choice exists: degrees must divide the ranks and the heads");
  expect(words).toContain("no choice remains with --fix tensor=3");
  expect(words).toContain("fits without --fix tensor=3");
  expect(words).not.toContain("rows_bound");
});

test("dispatch, what runs beside exchanges, buckets and the order of microbatches are searched, kept if given, and printed where they differ", () => {
  const over = { ...job, parallel: { ...job.parallel, world: 8, data: 8 }, cluster: { ...job.cluster, gpus_per_node: 2, nodes: 4 } };
  const mesh = { micro_batch: 1, context: 1, recompute: "none", tensor: 1, pipeline: 1, expert: 8 } as const;
  const [kept] = search(over, { profile, fixed: { ...mesh, ...asInJob } }).best;
  const result = search(over, { profile, fixed: mesh });
  const [best] = result.best;
  if (!best || !kept) throw new Error("nothing was found");
  // groups of eight on four nodes: a token is sent to the ranks of its experts once, beside the kernels of another microbatch
  expect(best.choice).toMatchObject({ dispatch: "once", expert_overlap: "interleave" });
  expect(best.seconds).toBeLessThan(kept.seconds);
  const again = readJob(text, "small.yaml", ["cluster.gpus_per_node=2", "cluster.nodes=4", ...settingsOf(over, best.choice)]).job;
  expect(again && estimate(compile(again).plan, { profile }).seconds).toBeCloseTo(best.seconds, 12);
  const printed = printSearch(over, result, { top: 3, width: 80, fixed: mesh });
  expect(printed.join("\n")).toMatch(/MiB {2}once/);
  expect(printed.join(" ")).toContain("model.moe.dispatch=once");
  for (const line of printed) expect(textWidth(line), line).toBeLessThanOrEqual(80);
  // a given value is the only one
  const given = search(over, { profile, fixed: { ...mesh, dispatch: "all_to_all", expert_overlap: "none" } }).best;
  expect(new Set(given.map(({ choice }) => choice.dispatch))).toEqual(new Set(["all_to_all"]));
  expect(new Set(given.map(({ choice }) => choice.expert_overlap))).toEqual(new Set(["none"]));
});

test("a bound of rows is lowered where a choice does not fit otherwise", () => {
  const worst = jobOf({
    ...{ name: "rows", parallel: { world: 8 }, data: { path: "corpus.txt" } },
    model: { layers: 2, hidden: 4096, ffn: 14336, heads: 32, vocab: 4096, seq: 4096, moe: { experts: 8, top_k: 2, ffn: 14336 } },
    train: { global_batch: 32, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
    cluster: { nodes: 1, gpus_per_node: 8, device: "h100-80gb" },
  });
  const fixed = { tensor: 1, context: 1, pipeline: 1, expert: 8, expert_tensor: 1, micro_batch: 2, recompute: "none", ...asInJob } as const;
  const { rows_bound: _, ...open } = fixed;
  const choice = { ...fixed, virtual_pipeline: 1 };
  const peak = (rows_bound: "job" | 1.5): number => peakOf(jobWith(worst, { ...choice, rows_bound })).bytes;
  expect(peak(1.5)).toBeLessThan(peak("job"));
  // room for the lower bound alone
  const reserve = deviceOf("h100-80gb").memory - (peak(1.5) + peak("job")) / 2;
  const { best } = search(worst, { profile, fixed: open, plans: 3, reserve });
  expect(best[0]?.choice.rows_bound).toBe(1.5);
  expect(settingsOf(worst, best[0]?.choice ?? choice)).toContain("model.moe.rows_bound=1.5");
  expect(search(worst, { profile, fixed, plans: 3, reserve }).best).toEqual([]);
});

test("search refuses values that a key beside the mesh does not have", async () => {
  const job = ["plans/tiny-mixtral/job.yaml", "--device", "h100-80gb"];
  expect((await rankc("search", ...job, "--fix", "dispatch=twice")).err).toContain("write job, all_to_all, once");
  for (const value of ["0.5", "-1", "1e9", "1000000"])
    expect((await rankc("search", ...job, "--fix", `rows_bound=${value}`)).err).toContain("write job or a number from 1 to 999,999");
});

test.each(["dispatch=once", "rows_bound=1.5", "expert_overlap=shared"])(
  "search refuses --fix %s for a model without experts",
  async (fix) => {
    const dense = ["search", "plans/tiny-dense/job.yaml", "--device", "h100-80gb", "--plans", "1", "--fix"];
    expect((await rankc(...dense, fix)).err).toContain(`--fix ${fix}: the model has no experts`);
  },
);

test("a choice sets no key of experts in a model that has none", () => {
  const { job: dense } = readJob(text.replace(/, moe: .*/, "}"), "dense.yaml", []);
  if (!dense) throw new Error("the dense job is invalid");
  const { value: choice } = choicesOf(dense, { dispatch: "once", rows_bound: 1.5 }).next();
  expect(settingsOf(dense, choice as JobChoice).filter((set) => set.startsWith("model."))).toEqual([]);
});
