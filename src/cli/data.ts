/** `rankc data`: prepares token data sets from corpora, and shows what a data set holds. */
import { availableParallelism } from "node:os";
import { type Command, Option } from "commander";
import type { DocumentBorder } from "../../runtime/data/prepare/documents.ts";
import type { InspectedDataset } from "../../runtime/data/prepare/inspect.ts";
import type { PrepareProgress } from "../../runtime/data/prepare/prepare.ts";
import { printable } from "../../schemas/printable.ts";
import { bytesText, countText, plural } from "../units.ts";
import { atLeastOne, type CommonOptions, type ProcessExit, withExamples, withFormat } from "./options.ts";
import { endProgress, printJson, printProgress, printStderr, printStdout, progressInterval } from "./output.ts";
import { duration } from "./progress.ts";

interface PrepareOptions extends CommonOptions {
  readonly tokenizer: string;
  readonly encoding?: string;
  readonly out: string;
  readonly documents: DocumentBorder;
  readonly key: string;
  readonly eod?: string;
  readonly workers?: number;
  readonly restart?: true;
  readonly overwrite?: true;
}
interface InspectOptions extends CommonOptions {
  readonly tokenizer?: string;
  readonly encoding?: string;
  readonly samples: number;
}

/** Registers `data` with its commands. */
export function registerData(program: Command, exit: ProcessExit): void {
  const data = program.command("data").description("prepare token data sets, and look into them");
  registerPrepare(data, exit);
  registerInspect(data);
}

const tokenizerHelp =
  "bytes, or a path: tokenizer.json, tokenizer.model (SentencePiece), a file of tiktoken, or a folder with one of the first two";
const encodingHelp = "of a tiktoken file: cl100k_base, o200k_base, … (default: the one in the file's name)";

function registerPrepare(data: Command, exit: ProcessExit): void {
  withExamples(
    withFormat(
      data.command("prepare").description("tokenize text, .jsonl and .parquet into PREFIX.bin and PREFIX.idx, Megatron's indexed format"),
    )
      .argument("<inputs...>", "files, or folders of files; .gz and .zst are decompressed")
      .requiredOption("-t, --tokenizer <tokenizer>", tokenizerHelp)
      .requiredOption("-o, --out <prefix>", "the data set to write: PREFIX.bin, PREFIX.idx and PREFIX.json")
      .option("--encoding <name>", encodingHelp)
      .option("--key <name>", "the key of JSON records, or the column of Parquet, that has the text", "text")
      .addOption(
        new Option(
          "--documents <border>",
          "what separates the documents of a text: each file is one, or blank lines or line ends separate them",
        )
          .choices(["file", "blank-line", "line"])
          .default("file"),
      )
      .option("--eod <token>", "the token or id that ends each document, or none (default: the one that the tokenizer names)")
      .option(
        "--workers <n>",
        "threads that tokenize, at most four per core; the bytes do not depend on it (default: one per core)",
        atLeastOne,
      )
      .option("--restart", "begin again instead of going on where an earlier call stopped")
      .option("--overwrite", "replace a data set of the same name"),
    "data prepare corpus.jsonl -t tokenizer.json -o data/corpus",
    "data prepare part-*.jsonl.zst --key content -t tokenizer.model -o data/corpus",
    "data prepare books/ --documents blank-line -t bytes --eod 0 -o data/books",
  ).action(async (inputs: string[], options: PrepareOptions) => {
    const { prepareDataset } = await import("../../runtime/data/prepare/prepare.ts");
    const stop = new AbortController();
    const interrupt = (): void => stop.abort();
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, interrupt);
    let printed = 0;
    const onProgress = (progress: PrepareProgress): void => {
      if (progress.seconds - printed < progressInterval()) return;
      printed = progress.seconds;
      printProgress(prepareLine(progress));
    };
    const { documents: border, key, eod: end, workers, tokenizer, encoding, restart = false, overwrite = false } = options;
    try {
      const prepared = await prepareDataset({
        ...{ inputs, prefix: options.out, tokenizer, encoding, end, documents: { border, key }, restart, overwrite },
        ...{ threads: Math.min(workers ?? availableParallelism(), 4 * availableParallelism()), signal: stop.signal, onProgress },
        onWarning: (warning) => printStderr(`warning: ${warning}`),
      });
      if (printed > 0) endProgress();
      if (prepared.stopped) {
        exit.setCode(130);
        printStderr(`interrupted after ${plural(prepared.documents, "document")}; the same command goes on from here`);
      } else if (options.format === "json") printJson(prepared);
      else
        printStdout(
          `${prepared.prefix}: ${plural(prepared.documents, "document")}, ${plural(prepared.tokens, "token")} of ${prepared.vocab} (${prepared.dtype}) from ${bytesText(prepared.text_bytes)} of text in ${duration(prepared.seconds)}${prepared.empty_documents > 0 ? `; ${prepared.empty_documents} without text left out` : ""}`,
        );
    } finally {
      for (const signal of ["SIGINT", "SIGTERM"] as const) process.removeListener(signal, interrupt);
    }
  });
}

/** Formats the progress of a preparation. */
function prepareLine({ share, from, seconds, documents, tokens, textBytes }: PrepareProgress): string {
  const done = share - from;
  const left = done > 0 ? `${duration(((1 - share) * seconds) / done)} left` : "";
  return `${(100 * share).toFixed(1).padStart(5)} %  ${plural(documents, "document")}  ${(tokens / 1e6).toFixed(1)} M tokens  ${bytesText(textBytes)}  ${left}`;
}

function registerInspect(data: Command): void {
  withExamples(
    withFormat(data.command("inspect").description("show documents, tokens, lengths and a decoded sample of a data set"))
      .argument("<prefix>", "the data set: PREFIX of PREFIX.bin and PREFIX.idx")
      .option("-t, --tokenizer <tokenizer>", `decodes the sample (default: the one of PREFIX.json): ${tokenizerHelp}`)
      .option("--encoding <name>", encodingHelp)
      .option("--samples <n>", "documents to show", atLeastOne, 3),
    "data inspect data/corpus",
    "data inspect data/corpus --samples 10 --format json",
  ).action(async (prefix: string, options: InspectOptions) => {
    const { inspectDataset } = await import("../../runtime/data/prepare/inspect.ts");
    const view = inspectDataset(prefix, { tokenizer: options.tokenizer, encoding: options.encoding, samples: options.samples, tokens: 64 });
    if (options.format === "json") printJson(view);
    else printStdout(datasetText(view));
  });
}

function datasetText({ prefix, documents, tokens, bytes, dtype, lengths, description, samples }: InspectedDataset): string {
  const row = (name: string, text: string): string => `${name.padEnd(12)}${text}`;
  const { least, median, mean, p90, most } = lengths;
  return [
    row("data set", prefix),
    row("documents", countText(documents)),
    row("tokens", `${countText(tokens)} as ${dtype}, ${bytesText(bytes)}`),
    row("lengths", `least ${least}, median ${median}, mean ${mean.toFixed(1)}, 90 % up to ${p90}, most ${most}`),
    ...(description
      ? [
          row(
            "tokenizer",
            `${description.tokenizer === "bytes" ? "bytes" : `${description.kind}, ${description.tokenizer}`}, ${description.vocab} ids`,
          ),
          row("end", description.end_of_document === null ? "none" : `id ${description.end_of_document}`),
          row("text", `${bytesText(description.text_bytes)}, ${(description.text_bytes / tokens).toFixed(2)} bytes per token`),
        ]
      : []),
    ...samples.map(({ document, ids, text }) =>
      row(`# ${document}`, text === undefined ? `ids ${ids.slice(0, 24).join(" ")}` : printable(text, 160)),
    ),
  ].join("\n");
}
