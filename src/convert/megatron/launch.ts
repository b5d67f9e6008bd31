/** The launch of a training in a script: its entry script, its arguments, and the ranks that the launcher starts. */

import type { Problem } from "../problems.ts";
import { giveValue } from "./arguments/read.ts";
import type { CalledCommand } from "./bash/calls.ts";
import { textOf } from "./bash/scope.ts";
import { holesOf, knownValue, type ScriptText, shownText } from "./bash/text.ts";
import type { World } from "./job/parallel.ts";

/** A launch of a training. */
export interface TrainingLaunch {
  readonly entry: string;
  /** The words after the entry script. */
  readonly words: readonly ScriptText[];
  readonly place: string;
  /** The words before the entry script, of `srun` and the like first. */
  readonly launcher: readonly ScriptText[];
  readonly command: CalledCommand;
}

/** A launch of Megatron gives at least one of these. */
const SIGNS = new Set(["--num-layers", "--hidden-size", "--num-attention-heads", "--micro-batch-size"]);

/** Commands that print a launch, and do not start it. */
const PRINTS = new Set(["echo", "printf", "cat", "tee", "ls", "rm", "cp"]);

const isTorchrun = (word: string): boolean => /(?:^|\/)torchrun$/.test(word) || /^torch\.distributed\.(?:run|launch)$/.test(word);

/** Switches of torchrun; its other options take a value. */
const SWITCHES = new Set(["standalone", "no_python", "module", "run_path", "m"]);

/** Returns the place of the entry script among the words of a command. */
function entryOf(words: readonly ScriptText[]): number | undefined {
  const known = words.map((word) => knownValue(word) ?? "");
  // its folder need not be known
  const script = words.map(shownText).findIndex((word) => /\.py$/.test(word) && !word.startsWith("-"));
  if (script >= 0) return script;
  const module = known.findIndex((word, i) => known[i - 1] === "-m" && !isTorchrun(word));
  if (module >= 0) return module;
  const launcher = known.findIndex(isTorchrun);
  if (launcher < 0) return undefined;
  for (let i = launcher + 1; i < words.length; i++) {
    const word = known[i] ?? "";
    if (!word.startsWith("-")) return i;
    const name = word.replace(/^-+/, "").replaceAll("-", "_");
    if (!word.includes("=") && !SWITCHES.has(name)) i++;
  }
  return undefined;
}

/** Returns the launches among the commands of a script. */
export function launchesIn(commands: readonly CalledCommand[]): readonly TrainingLaunch[] {
  return commands.flatMap((command) => {
    const at = entryOf(command.words);
    if (at === undefined || PRINTS.has(knownValue(command.words[0] ?? []) ?? "")) return [];
    const words = command.words.slice(at + 1);
    if (!words.some((word) => SIGNS.has((knownValue(word.slice(0, 1)) ?? "").replace(/=.*/, "")))) return [];
    const launcher = [...command.around.flat(), ...command.words.slice(0, at)];
    return [{ entry: shownText(command.words[at] ?? []), words, place: command.place, launcher, command }];
  });
}

/** Finds the value of an option of a launcher: `--nnodes 2`, `--nnodes=2`, `-N 2`, `-N2`. */
function optionOf(words: readonly ScriptText[], names: readonly string[]): ScriptText | undefined {
  for (const [i, word] of words.entries()) {
    const [first, ...rest] = word;
    if (typeof first !== "string") continue;
    const { name, value } = /^--?(?<name>[A-Za-z][\w-]*)(?:=(?<value>[\s\S]*))?$/.exec(first)?.groups ?? {};
    if (name === undefined || !names.includes(name.replaceAll("-", "_"))) continue;
    if (value !== undefined) return [value, ...rest];
    return rest.length > 0 ? rest : words[i + 1];
  }
  return undefined;
}

/** Reads the number of ranks from the words of the launcher, or from the variables of the scheduler. Problems are reported, unless `asked` gives the number. */
export function worldOf({ launcher, command, place }: TrainingLaunch, asked: number | undefined, problems: Problem[]): World | undefined {
  const count = (what: string, text: ScriptText | undefined): number | undefined => {
    if (text === undefined) return undefined;
    const value = knownValue(text);
    if (value !== undefined && /^[1-9]\d*$/.test(value)) return Number(value);
    if (asked !== undefined) return undefined;
    const [hole] = holesOf(text);
    problems.push({
      kind: "value",
      subject: `${hole ? `line ${hole.line}` : place}: ${what} ${shownText(text)}`,
      why: hole?.why ?? "it is not a number",
      fix: `--world N gives the number of ranks${hole ? `, or ${giveValue(hole)}` : ""}`,
    });
    return undefined;
  };
  const variable = (name: string): ScriptText | undefined => {
    const value = command.scope.get(name);
    return value && textOf(value);
  };
  const before = problems.length;
  const isRun = launcher.some((word) => isTorchrun(knownValue(word) ?? ""));
  const nodesText = optionOf(launcher, isRun ? ["nnodes"] : ["nodes", "N", "nnodes"]) ?? (isRun ? ["1"] : variable("SLURM_NNODES"));
  const perNodeText = isRun
    ? (optionOf(launcher, ["nproc_per_node"]) ?? ["1"])
    : (optionOf(launcher, ["ntasks_per_node"]) ?? variable("SLURM_NTASKS_PER_NODE") ?? variable("SLURM_GPUS_ON_NODE"));
  const totalText = isRun ? undefined : optionOf(launcher, ["ntasks", "n", "np"]);
  const nodes = count("nodes", nodesText);
  const perNode = count("ranks of a node", perNodeText);
  const total = count("ranks", totalText);
  if (asked !== undefined) {
    const own = perNode !== undefined && asked % perNode === 0 ? perNode : undefined;
    return { ranks: asked, ...(own !== undefined && { perNode: own, nodes: asked / own }), source: "--world" };
  }
  const source = isRun ? "torchrun" : "the launcher";
  if (total !== undefined) return { ranks: total, source };
  if (nodes !== undefined && perNode !== undefined) return { ranks: nodes * perNode, nodes, perNode, source };
  const world = problems.length > before ? undefined : count("WORLD_SIZE", variable("WORLD_SIZE"));
  if (world !== undefined) return { ranks: world, source: "WORLD_SIZE" };
  if (problems.length === before) problems.push(unknownWorld);
  return undefined;
}

/** The problem of a launch whose number of ranks nothing says. */
export const unknownWorld: Problem = {
  kind: "value",
  subject: "the number of ranks",
  why: "no launcher is given, or it does not say how many ranks it starts",
  fix: "--world N",
};
