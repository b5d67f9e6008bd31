import { dirname, resolve } from "node:path";
import { type Command, InvalidArgumentError } from "commander";
import type { ImportedJob } from "../convert/importedJob.ts";
import type { MegatronSource } from "../convert/megatron/importMegatron.ts";
import { type ImportOutput, printImported } from "./importOutput.ts";
import { atLeastOne, collect, type ProcessExit, withExamples, withFormat } from "./options.ts";

interface Options extends ImportOutput {
  readonly world?: number;
  readonly set: readonly (readonly [name: string, value: string])[];
  readonly vocab?: number;
  readonly launch?: number;
  readonly drop: readonly string[];
  readonly name?: string;
}

/** Parses NAME=VALUE. Throws InvalidArgumentError. */
function variable(text: string, all: Options["set"]): Options["set"] {
  const { name, value } = /^(?<name>[A-Za-z_]\w*)=(?<value>[\s\S]*)$/.exec(text)?.groups ?? {};
  if (name === undefined || value === undefined) throw new InvalidArgumentError("It is not VARIABLE=VALUE.");
  return [...all, [name, value]];
}

/** Words that begin a launch, where no file of that name is meant. */
const isLaunchWord = (word: string): boolean => /^-|\s|^(?:torchrun|python\d?(?:\.\d+)?|srun|mpirun|accelerate)$|\.py$/.test(word);

/** Registers `import megatron`: writes the job of a launch script, a list of arguments, or the arguments themselves. */
export function registerImportMegatron(importing: Command, exit: ProcessExit): void {
  withExamples(
    withFormat(importing.command("megatron"))
      .description("make a job from a Megatron-LM launch: a bash script (read, never run), a YAML list of arguments, or the arguments")
      .argument("[file]", "the script or the list; without it, the launch stands after --")
      .argument("[words...]", "after --: the script's own words, further arguments of a list, or the launch")
      .option("-o, --out <job>", "the file to write (default: stdout)")
      .option("--world <ranks>", "the number of ranks, where the launcher does not say it", atLeastOne)
      .option("--set <variable=value>", "a variable of the script, whatever the script assigns (repeatable)", variable, [])
      .option("--vocab <tokens>", "the size of the tokenizer, added tokens included, before it is padded", atLeastOne)
      .option("--launch <number>", "which launch of a script that has several, from 1", atLeastOne)
      .option("--drop <argument>", "leave out an argument that rankc lacks, for example fp8-format (repeatable)", collect, [])
      .option("--name <name>", "the name of the job (default: that of the file)"),
    "import megatron pretrain_mixtral.sh -o job.yaml",
    "import megatron run.sh --world 64 --set NNODES=8 -o job.yaml -- /checkpoints /data/text_document",
    "import megatron Qwen3-30B-A3B.yaml --set TP=1 --set PP=1 --set EP=8 --world 32 -o job.yaml -- --moe-token-dispatcher-type alltoall",
    "import megatron --world 8 -- --num-layers 16 --hidden-size 2048 …",
  ).action(async (file: string | undefined, words: readonly string[], options: Options) => {
    const [{ importMegatron }, { readLaunchFile, readIncludedScript }] = await Promise.all([
      import("../convert/megatron/importMegatron.ts"),
      import("./inputFiles.ts"),
    ]);
    const hasFile = file !== undefined && !isLaunchWord(file);
    const read = hasFile ? readLaunchFile(file) : undefined;
    const source: MegatronSource = read ? { kind: /\.ya?ml$/.test(read.file) ? "list" : "script", ...read } : { kind: "words" };
    const { world, vocab, launch, drop } = options;
    const folder = hasFile ? dirname(resolve(file)) : process.cwd();
    const make = (): ImportedJob =>
      importMegatron(source, {
        name: options.name ?? read?.name ?? "megatron",
        words: hasFile || file === undefined ? words : [file, ...words],
        variables: new Map(options.set),
        ...(world !== undefined && { world }),
        ...(vocab !== undefined && { vocab }),
        ...(launch !== undefined && { launch }),
        ...{ drop, readScript: (path: string) => readIncludedScript(path, folder) },
      });
    await printImported(make, options, exit);
  });
}
