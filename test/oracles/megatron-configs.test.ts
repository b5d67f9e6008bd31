/**
 * The verdicts are those of Megatron-LM: each of 483 launches is imported as a user would import it, and the job is checked. The verdict of
 * Megatron is the result of a run: an error while it reads the arguments, an error in the first step, or none.
 */
import { describe, expect, test } from "vitest";
import { importMegatron } from "../../src/convert/megatron/importMegatron.ts";
import { ImportTrouble, type Problem } from "../../src/convert/problems.ts";
import type { Finding } from "../../src/frontend/diagnostic.ts";
import { readQuickly } from "../../src/frontend/readJob.ts";
import { byId, type Named, oracle } from "../support/oracle.ts";
import { byTier } from "../support/tiers.ts";

interface Case extends Named {
  readonly world: number;
  readonly verdict: "accept" | "reject";
  /** When Megatron noticed, of what it refuses; `silent`: accepted, though a setting is ignored or harmful. */
  readonly phase: "config" | "group_init" | "model_build" | "first_forward" | "silent" | null;
  readonly reason: string;
  readonly base: number;
  readonly args: string;
  readonly without?: readonly string[];
}
const { bases, cases } = oracle<{ bases: string[]; cases: Case[] }>("megatron-configs");

/** Returns the arguments by name, as they are written. */
const argsOf = (text: string): ReadonlyMap<string, string> =>
  new Map(
    text
      .split(/(?:^|\s)(?=--[A-Za-z])/)
      .map((word) => word.trim())
      .filter((word) => word !== "")
      .map((word) => [word.split(" ")[0] ?? "", word]),
  );

function wordsOf({ base, args, without = [] }: Case): string {
  const all = new Map([...argsOf(bases[base] ?? ""), ...argsOf(args)]);
  return [...all].flatMap(([name, word]) => (without.includes(name.slice(2)) && !argsOf(args).has(name) ? [] : [word])).join(" ");
}

/** The verdict of rankc: the refusals of the import, or the findings of the rules. Megatron does not check the memory of a device. */
function judged(c: Case): { readonly problems: readonly Problem[]; readonly findings: readonly Finding[] } {
  try {
    const { text } = importMegatron({ kind: "words" }, { name: "moved", world: c.world, words: [wordsOf(c)] });
    return { problems: [], findings: readQuickly(text, "moved.yaml", []).findings };
  } catch (error) {
    if (error instanceof ImportTrouble) return { problems: error.problems, findings: [] };
    throw error;
  }
}

/** Launches with what rankc does not have. */
const unsupported: Readonly<Record<string, string>> = {
  "cfg-0113": "logits in fp64",
  "cfg-0137": "weights of experts on their input",
  ...Object.fromEntries(["cfg-0153", "cfg-0156", "cfg-0157", "cfg-0158"].map((id) => [id, "products in 8 bits"])),
  "cfg-0171": "heads exchanged over context ranks",
  "cfg-0178": "experts made of a dense checkpoint",
  "cfg-0224": "a batch that grows by a table",
  "cfg-0438": "FSDP",
  "cfg-0442": "FSDP",
};

/** Where the verdicts differ, and why. */
const differences: Readonly<Record<string, { readonly rankc: "accept" | "reject"; readonly why: string }>> = {
  "cfg-0277": { rankc: "accept", why: "the environment of a run, CUDA_DEVICE_MAX_CONNECTIONS, is not among the arguments" },
  "cfg-0539": { rankc: "reject", why: "E417: Megatron fills up with experts of groups that were ruled out" },
  "cfg-0566": { rankc: "reject", why: "E433: Megatron drops every token" },
  "cfg-0576": { rankc: "reject", why: "E441: Megatron turns the sign of what the router sees" },
  "cfg-0581": { rankc: "reject", why: "E422: Megatron turns the experts' words around" },
  "cfg-0643": { rankc: "reject", why: "S014: Megatron builds experts of width 0, which compute nothing" },
};

/** Per reason of Megatron the verdict of rankc: a refusal, or none. */
const printed: Readonly<Record<string, string | readonly string[]>> = {
  // the ranks of that launch do not fill its grid of experts, which Megatron would notice later
  "TP or CP above 1 before Blackwell needs CUDA_DEVICE_MAX_CONNECTIONS=1": "P102",
  "world size is not divisible by TP x PP x CP": ["P101", "S012"],
  "micro-batch size must be positive": "S014",
  "global batch size must be positive": "S014",
  "global (evaluation) batch size is not divisible by micro-batch size x data-parallel size": "B201",
  "minimum learning rate is above the learning rate": "B203",
  "global batch size is not divisible by micro-batch size x data-parallel size": "B201",
  "layer count is missing": "S011",
  "a required size (hidden size, heads or maximum positions) is missing": "S011",
  "sequence length is missing": "S011",
  "learning rate is missing": "S011",
  "hidden size is not divisible by the number of heads": "M306",
  "sequence length is not a multiple of 2 x CP": "P111",
  "number of heads is not divisible by TP": "M302",
  "query groups are neither a multiple nor a divisor of TP": "M303",
  "layer count (with counted embedding and loss) is not divisible by PP": ["P107", "S012"],
  "layer count must be positive": "S014",
  "expert parallelism needs experts": "S014",
  "number of experts is not divisible by EP": "E402",
  "number of experts must not be negative": "S014",
  "top-1 softmax routing needs the softmax before top-k": "E412",
  "expert hidden size given without experts": "S011",
  "TP above 1 with MoE needs sequence parallelism in training": "P104",
  "world size is not divisible by ETP x EP x PP": "P102",
  "top-k exceeds the number of experts": "E401",
  "top-k of 0 divides by zero in the balancing loss": "S014",
  "expert hidden size is not divisible by ETP": "E403",
  "sequence length of a rank is not divisible by TP under sequence parallelism": "P111",
  "dense feed-forward size is not divisible by TP": "M305",
  "value of --lr is read as a flag (a negative number in exponent form)": "B202",
  "value of --min-lr is read as a flag (a negative number in exponent form)": "B203",
  "warmup must be shorter than the decay horizon": "B204",
  "starting weight decay must not be negative": "B209",
  "constant weight decay excludes start and end values": "B220",
  "increasing weight decay needs start and end values": "B219",
  "final weight decay is below the starting one": "B221",
  "WSD decay needs the length of its final phase": "B216",
  "the WSD final phase is longer than the decay horizon, so there is no stable phase": "B218",
  "initial warmup rate is above the learning rate": "B215",
  "value of --lr-decay-style is not one of its choices": "S013",
  "sequence parallelism is switched off because TP is 1": "P105",
  "a balancing loss with coefficient 0 does nothing": "E404",
  "balancing type none ignores its coefficient": "E405",
  "experts of width 0": "S014",
  "value of --moe-token-drop-policy is not one of its choices": "S013",
  "value of --moe-router-score-function is not one of its choices": "S013",
  "one coefficient per balancing type is required": "E413",
  "several coefficients given for a single balancing type": "E413",
  "a capacity factor excludes this balancing type": "E434",
  "padding to capacity needs a (non-negative) capacity factor": ["S011", "E433"],
  "shared expert size must be positive": "S014",
  "latent experts need experts": "S011",
  "MoE layer list may contain only 0 and 1": "S014",
  "MoE layer list must have one entry per layer": "E437",
  "MoE layer period must not be 0": "S014",
  "quantile balancing excludes group-limited routing": "E425",
  "tokens x top-k are not divisible by the number of experts (quantile balancing)": "E427",
  "sinkhorn excludes an auxiliary-loss coefficient": "E424",
  "more groups kept than top-k: every group scores zero and groups are chosen arbitrarily": "E419",
  "top-k / kept groups exceeds the experts of a group": "E417",
  "number of experts is not divisible by the number of groups": "E415",
  "a bias update rate without expert bias is ignored": "E421",
  "a bias update rate of 0 never moves the bias": "E421",
  "quantile balancing ignores an auxiliary-loss coefficient": "E424",
  "sinkhorn or quantile balancing inside a list is ignored": "E424",
  "sinkhorn ignores the groups": "E425",
  "kept groups hold fewer experts than top-k: masked experts are chosen": "E417",
  "a negative capacity factor silently means dropless": "E433",
  "a capacity factor of 0 drops every token": "E433",
  "a negative scaling factor negates the routing weights": "E422",
  "no layer is an MoE layer": "E438",
  "the second coefficient of a repeated balancing type is ignored": "E414",
  "decoder layers in the layout differ from the layer count": "P113",
  "MTP layers in the layout differ from the requested number": "P113",
  "layout must start with the embedding": "P113",
  "layout must end with the loss": "P113",
  "layout puts a decoder layer after an MTP layer": "P113",
  "unknown character in the layout": "P113",
  "virtual stages need more than one pipeline stage": "P114",
  "first stage must hold at least one layer": "P113",
  "first stage layers are not divisible by the virtual stages": "P113",
  "last stage layers are not divisible by the virtual stages": "P113",
  "remaining layers are not divisible by the remaining stages": "P113",
  "layers of a middle stage are not divisible by the virtual stages": "P113",
  "layers per pipeline stage are not divisible by the virtual stages": "P107",
  "more groups kept than exist": "E416",
  "expert routing bias needs sigmoid or sqrtsoftplus scores": "E420",
  "data-parallel size (with CP) is not divisible by the optimizer instances": "P116",
  "expert data-parallel size is not divisible by the optimizer instances": "P116",
  "value of --recompute-granularity is not one of its choices": "S013",
  "value of --recompute-method is not one of its choices": "S013",
  "recomputing the MLA up projection needs multi-latent attention": "B230",
  "several optimizer instances need the distributed optimizer": "P116",
  "pipeline-before-data rank order needs equal data-parallel sizes for dense and expert parts": "P117",
  "dropout probability must lie between 0 and 1": "M350",
  "jitter above 1 can flip the sign of inputs": "E441",
  "remaining layers and remaining stages do not match": "P113",
  // so many layers of a virtual stage are, in a job, so many chunks of a stage: no whole number of them
  "layers per pipeline stage are not divisible by layers per virtual stage": "S012",
};

test("rankc supports 472 of 483 launches, and 98 % of the verdicts on them agree", () => {
  expect(cases.length).toBe(483);
  const applicable = cases.length - Object.keys(unsupported).length;
  expect(applicable).toBe(472);
  expect(Object.keys(differences).length / applicable).toBeLessThan(0.02);
});

test("no entry of the tables is idle", () => {
  const ids = new Set(cases.map((c) => c.id));
  expect([...Object.keys(unsupported), ...Object.keys(differences)].filter((id) => !ids.has(id))).toEqual([]);
  const reasons = new Set(cases.map((c) => c.reason));
  expect(Object.keys(printed).filter((reason) => !reasons.has(reason))).toEqual([]);
});

describe("launches", () => {
  const isFast = (_: Case, i: number): boolean => i % 3 === 0;
  for (const { options, rows } of byTier(byId(cases), ([, c], i) => isFast(c, i)))
    test.each(rows)("%s", options, (id, c) => {
      const { problems, findings } = judged(c);
      const errors = findings.filter(({ level }) => level === "error");
      const shown = [...problems.map(({ subject, why }) => `${subject}: ${why}`), ...errors.map((e) => `${e.code} ${e.path}: ${e.found}`)];
      const isRefused = problems.some(({ kind }) => kind !== "unsupported") || errors.length > 0;
      if (Object.hasOwn(unsupported, id)) {
        expect(isRefused, shown.join("; ")).toBe(false);
        expect(problems.length).toBeGreaterThan(0);
        return;
      }
      const difference = differences[id];
      expect(problems.length === 0 || isRefused, shown.join("; ")).toBe(true);
      expect(isRefused ? "reject" : "accept", `${c.reason}; ${shown.join("; ")}`).toBe(difference?.rankc ?? c.verdict);
      if (difference) expect(difference.rankc).not.toBe(c.verdict);
      // a refusal by the rules is for Megatron's reason
      if (c.verdict !== "reject" || problems.length > 0 || difference) return;
      const codes = errors.map(({ code }) => code);
      expect(
        [printed[c.reason]].flat().filter((code) => code !== undefined && codes.includes(code)),
        `${c.reason}: ${codes}`,
      ).not.toEqual([]);
    });
});
