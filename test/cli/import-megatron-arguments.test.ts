/** Arguments of Megatron scripts, the command that imports them, and sequences of documents. */
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { parse } from "yaml";
import { JobText } from "../../schemas/job.ts";
import { argumentSpecs } from "../../src/convert/megatron/arguments/spec.ts";
import { importMegatron } from "../../src/convert/megatron/importMegatron.ts";
import { root } from "../support/checkout.ts";
import { problemsOf } from "../support/importProblems.ts";
import { fixture } from "../support/job.ts";
import { base, type Change, complete, expertsOf, imported, jobOf, refusalOf, wordsOf } from "../support/megatronImport.ts";
import { rankc } from "../support/rankc.ts";

test("the folder of the entry script need not be known", () => {
  const lines = ["#!/bin/bash", "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=8", `options="${wordsOf({}).join(" ")}"`];
  // biome-ignore lint/suspicious/noTemplateCurlyInString: an expansion of bash
  const text = [...lines, 'run_cmd="python -u $(dirname $0)/pretrain_gpt.py ${options}"', 'srun -l sh -c "${run_cmd}"'].join("\n");
  expect(complete(importMegatron({ kind: "script", text, file: "run.sh" }, { name: "a" })).parallel.world).toBe(32);
});

describe("arguments", () => {
  test("every argument of Megatron-LM is in the table, with a reason unless it is mapped", () => {
    expect(argumentSpecs.size).toBe(907);
    for (const { name, fate, why, instead } of argumentSpecs.values()) {
      expect(why, name).not.toBe("");
      if (fate === "unsupported") expect(instead, name).toBeTruthy();
    }
  });

  test("every argument that the table maps is read", () => {
    const folder = join(root, "src/convert/megatron/job");
    const code = readdirSync(folder)
      .map((file) => readFileSync(join(folder, file), "utf8"))
      .join("\n");
    const unread = [...argumentSpecs.values()].filter(({ name, fate }) => fate === "mapped" && !code.includes(`"${name}"`));
    expect(unread.map(({ name }) => name)).toEqual([]);
  });

  test("nothing is dropped: each given argument is mapped, or without effect with a reason", () => {
    const { mapped, withoutEffect } = imported({ "num-query-groups": "4", "no-rope-fusion": "", "log-interval": "1" });
    expect(mapped.length + withoutEffect.length).toBe(Object.keys(base).length + 3);
    expect(withoutEffect.map(({ argument }) => argument)).toEqual([
      "--max-position-embeddings 128",
      "--num-query-groups 4",
      "--no-rope-fusion",
      "--log-interval 1",
    ]);
    for (const { why } of withoutEffect) expect(why).toBeTruthy();
  });

  test("features that rankc lacks are errors with alternatives, and can be left out on request", () => {
    const change = { "fp8-format": "hybrid", "use-mup": "" };
    expect(problemsOf(() => imported(change))).toEqual([
      "--fp8-format hybrid: in rankc, products are computed in bf16, fp16 or fp32; --drop fp8-format to import the job in bf16",
      "--use-mup: in rankc, initialisation and learning rates do not depend on the width; leave it out",
    ]);
    const { dropped, text } = imported(change, { drop: ["fp8-format", "--use-mup"] });
    expect(dropped.map(({ argument }) => argument)).toEqual(["--fp8-format", "--use-mup"]);
    expect(text).toContain("# --fp8-format is left out on request.");
  });

  test("an unsupported argument with Megatron's default has no effect", () => {
    expect(refusalOf({ "main-params-dtype": "fp32", "glu-linear-offset": "0.0" })).toBe("");
    expect(refusalOf({ ...precise, "main-params-dtype": "fp16" })).toContain("main weights are exact");
  });

  const precise = { "use-precision-aware-optimizer": "", "use-distributed-optimizer": "" };
  test("sums of gradients and moments are imported in bf16 where Megatron has them in bf16", () => {
    const { train } = jobOf({ ...precise, "main-grads-dtype": "bf16", "exp-avg-dtype": "bf16", "exp-avg-sq-dtype": "bf16" });
    expect([train.gradients, train.optimizer.moments]).toEqual(["bf16", "bf16"]);
    const typesOf = (args: Parameters<typeof jobOf>[0]) => {
      const { gradients, gradient_reduction } = jobOf(args).train;
      return `${gradients} ${gradient_reduction}`;
    };
    expect(typesOf({ "grad-reduce-in-bf16": "" })).toBe("bf16 bf16");
    // fp32 sums that are asked for win, and without --bf16 Megatron does not read it
    expect(typesOf({ "grad-reduce-in-bf16": "", "accumulate-allreduce-grads-in-fp32": "" })).toBe("f32 f32");
    expect(typesOf({ "grad-reduce-in-bf16": "", bf16: null })).toBe("f32 f32");
    // sums over microbatches in fp32, over ranks in bf16
    const local = "ddp-param-name-patterns-for-fp32-local-accumulation";
    expect(typesOf({ "grad-reduce-in-bf16": "", [local]: "all" })).toBe("f32 bf16");
    expect(typesOf({ "grad-reduce-in-bf16": "", [local]: "*norm*" })).toBe("bf16 bf16");
    expect(typesOf({ [local]: "all" })).toBe("f32 f32");
    expect(refusalOf({ ...precise, "exp-avg-dtype": "bf16" })).toContain("both moments have one type");
    expect(refusalOf({ ...precise, "exp-avg-dtype": "fp8", "exp-avg-sq-dtype": "fp8" })).toContain("both moments have one type");
  });

  test("an unknown argument is an error with the nearest name", () => {
    expect(refusalOf({ "num-layer": "4" })).toContain("--num-layer 4: Megatron-LM has no such argument; --num-layers is the nearest");
  });

  test("types are Megatron's: rotary-base is a whole number", () => {
    expect(refusalOf({ "rotary-base": "1e6" })).toContain("--rotary-base 1e6: Megatron reads a whole number here");
    expect(refusalOf({ "cross-entropy-fusion-impl": "te" })).toBe("");
    expect(refusalOf({ "lr-decay-style": "cosin" })).toContain("write one of constant, linear, cosine");
    expect(refusalOf({ "cuda-graph-impl": "all" })).toContain("--cuda-graph-impl all: Megatron has no such choice");
  });

  test("numbers are read as Python reads them", () => {
    expect(jobOf({ "train-iters": "1_000", lr: ".5e-3", "min-lr": "1_0.e-5" }).train).toMatchObject({
      steps: 1000,
      optimizer: { lr: 5e-4, min_lr: 1e-4 },
    });
    expect(expertsOf({ "moe-aux-loss-coeff": "1_0e-3" }).router.aux_coeff).toBe(0.01);
    for (const lr of ["0x10", "1e", "inf", "1__0", "0b1"])
      expect(
        problemsOf(() => imported({ lr })),
        lr,
      ).toHaveLength(1);
    for (const iterations of ["0x10", "1e3", "1_"]) expect(problemsOf(() => imported({ "train-iters": iterations }))).toHaveLength(1);
  });

  test("of an argument that is given twice the last counts", () => {
    expect(complete(imported({}, { words: [...wordsOf({}), "--lr", "5e-4"] })).train.optimizer.lr).toBe(5e-4);
    expect(complete(imported({}, { words: [...wordsOf({}), "--lr=5e-4"] })).train.optimizer.lr).toBe(5e-4);
  });

  test.each([
    [{ "num-layers-per-virtual-pipeline-stage": "1", "num-virtual-stages-per-pipeline-rank": "2" }, "Megatron takes one of them alone"],
    [{ "pipeline-model-parallel-layout": "EttttL", "decoder-first-pipeline-num-layers": "4" }, "Megatron takes one of them alone"],
    [{ "mock-data": "", "data-path": "x" }, "Megatron takes one of them alone"],
    [{ "moe-pad-expert-input-to-capacity": "" }, "refuses it without --moe-expert-capacity-factor"],
    [{ "moe-pad-expert-input-to-capacity": "", "moe-expert-capacity-factor": "-1" }, "there is no capacity"],
    [{ "num-experts": null, "moe-ffn-hidden-size": "64" }, "refuses it without --num-experts"],
    [{ "num-experts": null, "expert-model-parallel-size": "2" }, "the model has no experts"],
    [{ "seq-length": "256" }, "a sequence has more tokens than positions"],
    [{ "start-weight-decay": "0.1" }, "weight decay is constant"],
    [{ "recompute-granularity": "selective", "recompute-method": "block" }, "takes no layers"],
    [{ fp16: "" }, "Megatron refuses them together"],
  ] satisfies [Change, string][])("a combination that Megatron refuses is refused, and not imported in part: %j", (change, expected) => {
    expect(refusalOf(change)).toContain(expected);
  });

  test("--no-position-embedding beside rope does nothing", () => {
    expect(jobOf({ "no-position-embedding": "" })).toEqual(jobOf());
  });
});

describe("the command", () => {
  const script = fixture("megatron/moonlight.sh");

  test("prints only the job to stdout, and the summary to stderr", async () => {
    const { exit, out, err } = await rankc("import", "megatron", "--world", "8", "--", ...wordsOf({}));
    expect([exit, JobText.safeParse(parse(out)).success]).toEqual([0, true]);
    expect(err).toContain("16 mapped, 1 without effect on the plan, 0 left out on request, 0 unsupported");
  });

  test("with --format json prints what became of each argument, and the problems with exit code 2", async () => {
    const good = await rankc("import", "megatron", "--world", "8", "--format", "json", "--", ...wordsOf({}));
    const { job, mapped, without_effect, problems } = JSON.parse(good.out);
    expect([good.exit, JobText.safeParse(parse(job)).success, mapped.length, without_effect.length, problems]).toEqual([
      0,
      true,
      16,
      1,
      [],
    ]);
    const bad = await rankc("import", "megatron", script, "--format", "json");
    expect(bad.exit).toBe(2);
    const found = JSON.parse(bad.out);
    expect(found.job).toBeNull();
    expect(found.problems).toContainEqual(expect.objectContaining({ kind: "value", subject: "line 19: --lr $5" }));
  });

  test("reads the scripts that a script reads, from its folder", async () => {
    const folder = mkdtempSync(join(tmpdir(), "rankc-launch-"));
    writeFileSync(join(folder, "model.sh"), `ARGS=(${wordsOf({}).join(" ")})\n`);
    // biome-ignore lint/suspicious/noTemplateCurlyInString: an expansion of bash
    writeFileSync(join(folder, "run.sh"), 'source model.sh\ntorchrun --nproc-per-node=8 pretrain_gpt.py "${ARGS[@]}"\n');
    try {
      const { exit, out } = await rankc("import", "megatron", join(folder, "run.sh"));
      expect([exit, parse(out).name, parse(out).parallel.world]).toEqual([0, "run", 8]);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test("a script with several launches needs a choice", async () => {
    const folder = mkdtempSync(join(tmpdir(), "rankc-launch-"));
    const launch = (ranks: number) => `torchrun --nproc_per_node ${ranks} pretrain_gpt.py ${wordsOf({}).join(" ")}\n`;
    writeFileSync(join(folder, "run.sh"), `${launch(4)}${launch(8)}`);
    try {
      const path = join(folder, "run.sh");
      const several = await rankc("import", "megatron", path);
      expect([several.exit, several.err]).toEqual([2, expect.stringContaining("has 2 launches:")]);
      const { out } = await rankc("import", "megatron", path, "--launch", "2");
      expect(parse(out).parallel.world).toBe(8);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});

describe("documents in one sequence", () => {
  test("each argument is a key of data.documents; without them there is none", () => {
    const data = { "data-path": "corpus" };
    expect(jobOf(data).data.documents).toBeUndefined();
    expect(jobOf({ ...data, "reset-attention-mask": "", "eod-mask-loss": "" }).data.documents).toEqual({
      ...{ mask: true, positions: false, loss: true, end: null },
    });
    expect(jobOf({ ...data, "reset-position-ids": "" }).data.documents).toMatchObject({ mask: false, positions: true, loss: false });
  });
  test("without known data the job has a token to replace", () => {
    expect(jobOf({ "mock-data": "", "reset-attention-mask": "" }).data.documents?.end).toBe(0);
    expect(imported({ "mock-data": "", "reset-attention-mask": "" }).text).toContain("end is to be set");
  });
});
