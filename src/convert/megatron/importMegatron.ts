/**
 * Imports a launch of Megatron-LM: a bash script, a YAML list of arguments, or the words themselves become a job. Arguments without effect
 * on the plan are reported with the reason; anything that rankc lacks is an error that lists all of it.
 */

import { Trouble } from "../../../schemas/trouble.ts";
import { type ArgumentReport, type ImportedJob, makeImported } from "../importedJob.ts";
import { newJobBuilder } from "../jobBuilder.ts";
import type { Problem } from "../problems.ts";
import { type Arguments, checkValues, readArguments } from "./arguments/read.ts";
import type { ScriptRead } from "./bash/calls.ts";
import { newScope } from "./bash/scope.ts";
import { readScript } from "./bash/script.ts";
import { knownValue, type ScriptText } from "./bash/text.ts";
import type { Importing } from "./job/importing.ts";
import { checkLaunch } from "./job/launchRules.ts";
import { putModel } from "./job/model.ts";
import { putExperts } from "./job/moe.ts";
import { degreesOf, putParallel, smallestWorld, type World } from "./job/parallel.ts";
import { putData, putTrain } from "./job/train.ts";
import { launchesIn, type TrainingLaunch, unknownWorld, worldOf } from "./launch.ts";
import { checkRefusals } from "./refusals/index.ts";
import { readArgumentList } from "./yamlArguments.ts";

/** What to import. */
export type MegatronSource =
  | { readonly kind: "script"; readonly text: string; readonly file: string }
  | { readonly kind: "list"; readonly text: string; readonly file: string }
  | { readonly kind: "words" };

/** Settings of the import. */
export interface MegatronSettings {
  /** The name of the job. */
  readonly name: string;
  /** The number of ranks, if the launcher does not set it. */
  readonly world?: number;
  /** Values of variables; assignments of the script do not change them. */
  readonly variables?: ReadonlyMap<string, string>;
  /** Words after `--`: those of the script, further arguments of a list, or the launch itself. */
  readonly words?: readonly string[];
  /** The size of the tokenizer, with added tokens. */
  readonly vocab?: number;
  /** Which launch of a script with several, from 1. */
  readonly launch?: number;
  /** Arguments to leave out, without dashes. */
  readonly drop?: readonly string[];
  /** Returns the text of another script that the script reads; undefined if it cannot be read. */
  readonly readScript?: (path: string) => string | undefined;
  /** The launch has trained, so what Megatron refuses is not reported. */
  readonly hasTrained?: true;
}

/** The words of a launch, and its number of ranks if it is known. */
interface Found {
  readonly words: readonly ScriptText[];
  readonly launch?: TrainingLaunch;
  readonly read?: ScriptRead;
}

/** Imports a launch. Throws a Trouble that lists all values that are missing and all features that rankc lacks. */
export function importMegatron(source: MegatronSource, settings: MegatronSettings): ImportedJob {
  const found = findLaunch(source, settings);
  const wider = settings.world === undefined && source.kind === "script" ? widerLaunch(source, found, settings) : undefined;
  return makeJob(wider?.found ?? found, wider?.settings ?? settings, source.kind === "words" ? "" : source.text, wider?.note);
}

function findLaunch(source: MegatronSource, settings: MegatronSettings): Found {
  const { words = [], variables = new Map() } = settings;
  if (source.kind === "list") {
    const own = readArgumentList(source.text, source.file, variables);
    return { words: [...own, ...words.map((word) => [word])] };
  }
  if (source.kind === "words") return findInWords(words, settings);
  const read = readScript(source.text, {
    file: source.file,
    words,
    pinned: variables,
    readScript: settings.readScript ?? (() => undefined),
  });
  const launch = chooseLaunch(launchesIn(read.commands), read, source.file, settings.launch);
  return { words: launch.words, launch, read };
}

/** Returns the launch of words: a command with its launcher, or arguments alone. One word with blanks is parsed as bash parses it. */
function findInWords(words: readonly string[], settings: MegatronSettings): Found {
  const [only] = words;
  if (only !== undefined && words.length === 1 && /\s/.test(only)) {
    const text = only.trimStart().startsWith("--") ? `pretrain_gpt.py ${only}` : only;
    const found = findLaunch({ kind: "script", text, file: "the arguments" }, { ...settings, words: [] });
    return only.trimStart().startsWith("--") ? { words: found.words } : found;
  }
  const texts = words.map((word): ScriptText => [word]);
  if (only === undefined || only.startsWith("--")) return { words: texts };
  const scope = newScope(new Map(), []);
  const read: ScriptRead = { commands: [{ words: texts, around: [], place: "the command", scope }], defaults: new Map(), unread: [] };
  const launch = chooseLaunch(launchesIn(read.commands), read, "the command", undefined);
  return { words: launch.words, launch };
}

function chooseLaunch(launches: readonly TrainingLaunch[], read: ScriptRead, file: string, number: number | undefined): TrainingLaunch {
  const [first, ...others] = launches;
  if (!first) throw noLaunch(read, file);
  if (number !== undefined) {
    const chosen = launches[number - 1];
    if (!chosen) throw new Trouble(`${file} has ${launches.length} launches, and no number ${number}`, `--launch 1 to ${launches.length}`);
    return chosen;
  }
  if (others.length === 0) return first;
  const lines = launches.map(
    ({ entry, place, command }, i) => `\n  ${i + 1}: ${entry} at ${place}${command.condition ? `, under ${command.condition}` : ""}`,
  );
  throw new Trouble(`${file} has ${launches.length} launches:${lines.join("")}`, "--launch N chooses one");
}

function noLaunch({ exit, unread }: ScriptRead, file: string): Trouble {
  const title = `${file} has no launch that rankc can read: no command with an entry script and arguments such as --num-layers`;
  if (exit !== undefined)
    return new Trouble(
      `${title}; the script ends at ${exit} with exit`,
      "give the words that the script expects after --, or variables by --set",
    );
  if (unread.length > 0) return new Trouble(`${title}; it reads ${unread.join(", ")}`, "import from where these scripts can be read");
  return new Trouble(title, "name the script that calls torchrun, or give its arguments after --");
}

/**
 * Scripts are shared with a default of one node, `${NNODES:-1}`, that is too small for their degrees. If the ranks are too few for both
 * grids and the number of nodes is such a default, the smallest number of nodes that suffices is used, and a note states it.
 */
function widerLaunch(source: MegatronSource, found: Found, settings: MegatronSettings) {
  if (!found.launch || !found.read) return undefined;
  const ranksOf = ({ launch }: Found): number | undefined => (launch ? worldOf(launch, undefined, [])?.ranks : undefined);
  const ranks = ranksOf(found);
  const args = readArguments(found.words, new Set(), []);
  const least = leastWorld(args);
  if (ranks === undefined || ranks % least === 0) return undefined;
  const divisor = (a: number, b: number): number => (b === 0 ? a : divisor(b, a % b));
  const times = least / divisor(ranks, least);
  for (const [variable, value] of found.read.defaults) {
    if (!/^[1-9]\d*$/.test(value)) continue;
    const wanted = String(Number(value) * times);
    const wider = { ...settings, variables: new Map([...(settings.variables ?? []), [variable, wanted] as const]) };
    const again = findLaunch(source, wider);
    if (ranksOf(again) !== ranks * times) continue;
    const note = `${variable} is ${wanted}: with the script's default of ${value} there are ${ranks} ranks, and the degrees need a multiple of ${least}.`;
    return { found: again, settings: wider, note };
  }
  return undefined;
}

/** Returns the number of ranks whose multiples the degrees allow. */
function leastWorld(args: Arguments): number {
  const { job } = { job: newJobBuilder(args.has, "", []) };
  return smallestWorld(degreesOf({ args, job }, (args.numberIfGiven("num-experts") ?? 0) > 0));
}

/** Makes the job of a launch. `text`: the script or list that it is read from. */
function makeJob({ words, launch }: Found, settings: MegatronSettings, text: string, note: string | undefined): ImportedJob {
  const problems: Problem[] = [];
  const drop = new Set((settings.drop ?? []).map((name) => name.replace(/^--/, "")));
  const args = readArguments(words, drop, problems);
  const job = newJobBuilder(args.has, "Megatron's default", problems);
  const importing: Importing = { args, job };
  if (note !== undefined) job.note(note);
  const world = launch ? worldOf(launch, settings.world, problems) : worldOfSettings(settings, problems);
  const sizes = putModel(importing, settings.vocab);
  const hasExperts = putExperts(importing, sizes, world);
  const degrees = degreesOf(importing, hasExperts);
  const ranks = world ?? { ranks: smallestWorld(degrees), source: "" };
  putParallel(importing, ranks, sizes, degrees, hasExperts);
  const data = ranks.ranks / (degrees.tensor * degrees.pipeline * degrees.context);
  putTrain(importing, data);
  putData(importing);
  checkLaunch(importing);
  if (!settings.hasTrained) checkRefusals(importing, data);
  const dropped = [...drop].map((name) => `--${name}`);
  const reports = reportArguments(args, job.keysOf, problems);
  return makeImported({ name: settings.name, job, problems: problems.map((problem) => placed(problem, text)), reports, dropped });
}

/** Returns a problem with the line of its argument, where the text has it once. */
function placed(problem: Problem, text: string): Problem {
  const [name] = /^--[\w-]+/.exec(problem.subject) ?? [];
  if (name === undefined) return problem;
  const isHere = new RegExp(`^[^#]*(?<![\\w-])${name}(?![\\w-])`);
  const lines = text.split("\n").flatMap((line, i) => (isHere.test(line) ? [i + 1] : []));
  return lines.length === 1 ? { ...problem, subject: `line ${lines[0]}: ${problem.subject}` } : problem;
}

/** Returns the number of ranks for a list of arguments, which does not contain it: the scripts of the model zoo start 8 per node on NNODES nodes. */
function worldOfSettings({ world, variables }: MegatronSettings, problems: Problem[]): World | undefined {
  if (world !== undefined) return { ranks: world, source: "--world" };
  const nodes = Number(variables?.get("NNODES"));
  if (Number.isInteger(nodes) && nodes > 0) return { ranks: 8 * nodes, nodes, perNode: 8, source: "NNODES" };
  problems.push(unknownWorld);
  return undefined;
}

/** Returns for each argument the keys that it set, or the reason why it set none. Unsupported arguments are problems, unless they have Megatron's default. */
function reportArguments(args: Arguments, keysOf: ReadonlyMap<string, readonly string[]>, problems: Problem[]): readonly ArgumentReport[] {
  return [...args.given.values()].flatMap(({ spec, shown, values }) => {
    const keys = keysOf.get(spec.name) ?? [];
    // Megatron validates the value of an argument also if nothing reads it
    if (keys.length === 0 && spec.fate === "mapped") checkValues(spec, values, shown, problems);
    if (keys.length > 0 || spec.fate !== "unsupported") return [{ argument: shown, keys, why: spec.why }];
    if (problems.some(({ kind, subject }) => kind === "value" && subject === shown)) return [];
    const value = values.length === 1 && values[0] ? knownValue(values[0]) : undefined;
    const isDefault =
      value !== undefined && spec.default !== undefined && (value === spec.default || Number(value) === Number(spec.default));
    if (isDefault) return [{ argument: shown, keys, why: "is Megatron's default" }];
    problems.push({ kind: "unsupported", subject: shown, why: `in rankc, ${spec.why}`, fix: dropFix(spec.instead ?? "", spec.name) });
    return [];
  });
}

const dropFix = (instead: string, name: string): string => instead.replace("--drop the argument", `--drop ${name}`);
