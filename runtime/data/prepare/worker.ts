/** The threads that tokenize: each opens the tokenizer once and answers blocks in the order in which it receives them. */
import { isMainThread, parentPort, type Worker, workerData } from "node:worker_threads";
import { Trouble } from "../../../schemas/trouble.ts";
import { moduleUrl } from "../../moduleUrl.ts";
import { startThread } from "../../thread.ts";
import { openTokenizer } from "../tokenizers/openTokenizer.ts";
import type { Tokenizer } from "../tokenizers/tokenizer.ts";
import type { DocumentRules, DocumentSource } from "./documents.ts";
import { type TokenizedBlock, type TokenRules, tokenizeBlock } from "./tokenizeBlock.ts";

/** What a thread needs to know once. */
export interface TokenizeSettings {
  readonly tokenizer: string;
  readonly encoding: string | undefined;
  readonly documents: DocumentRules;
  readonly tokens: TokenRules;
}
type Answer =
  | { readonly done: TokenizedBlock }
  | { readonly trouble: { readonly message: string; readonly fix: string | undefined } }
  | { readonly bug: string };

/** Threads that tokenize blocks. */
export interface TokenizePool {
  /** Tokenizes a block. The promise rejects with a Trouble that names file and line. */
  readonly tokenize: (sources: readonly DocumentSource[]) => Promise<TokenizedBlock>;
  readonly close: () => Promise<void>;
}

/** Opens a pool of up to `threads` threads. One starts when all others have a block; a block goes to the thread with the fewest. */
export function openTokenizePool(settings: TokenizeSettings, threads: number): TokenizePool {
  const members: Member[] = [];
  const started = (): Member => {
    const member = openMember(settings);
    members.push(member);
    return member;
  };
  return {
    tokenize: (sources) => {
      const [first, ...others] = members;
      if (first === undefined) return started().tokenize(sources);
      const least = others.reduce((least, member) => (member.waiting() < least.waiting() ? member : least), first);
      const member = least.waiting() > 0 && members.length < threads ? started() : least;
      return member.tokenize(sources);
    },
    close: async () => {
      await Promise.all(members.map(({ worker }) => worker.terminate()));
    },
  };
}

interface Member {
  readonly worker: Worker;
  /** The number of blocks that it has not answered. */
  readonly waiting: () => number;
  readonly tokenize: TokenizePool["tokenize"];
}

function openMember(settings: TokenizeSettings): Member {
  const worker = startThread(moduleUrl("data/prepare/worker", import.meta.url), { workerData: settings });
  const asked: { resolve(block: TokenizedBlock): void; reject(error: Error): void }[] = [];
  let failed: Error | undefined;
  worker.on("message", (answer: Answer) => {
    const question = asked.shift();
    if ("done" in answer) question?.resolve(answer.done);
    else question?.reject("trouble" in answer ? new Trouble(answer.trouble.message, answer.trouble.fix) : new Error(answer.bug));
  });
  worker.on("error", (error: Error) => {
    failed = error;
    for (const { reject } of asked.splice(0)) reject(error);
  });
  return {
    worker,
    waiting: () => asked.length,
    tokenize: (sources: readonly DocumentSource[]) =>
      new Promise<TokenizedBlock>((resolve, reject) => {
        if (failed) return reject(failed);
        asked.push({ resolve, reject });
        worker.postMessage(
          sources,
          sources.flatMap((source) => (source.kind === "texts" ? [] : [source.bytes.buffer])),
        );
      }),
  };
}

function serve({ tokenizer: path, encoding, documents, tokens }: TokenizeSettings): void {
  let tokenizer: Tokenizer | undefined;
  parentPort?.on("message", (sources: readonly DocumentSource[]) => {
    let answer: Answer;
    try {
      tokenizer ??= openTokenizer(path, encoding);
      answer = { done: tokenizeBlock(sources, tokenizer, documents, tokens) };
    } catch (error) {
      answer =
        error instanceof Trouble
          ? { trouble: { message: error.message, fix: error.fix } }
          : { bug: error instanceof Error ? (error.stack ?? error.message) : String(error) };
    }
    parentPort?.postMessage(answer, "done" in answer ? [answer.done.ids.buffer, answer.done.lengths.buffer] : []);
  });
}

if (!isMainThread && workerData?.documents !== undefined && workerData?.tokens !== undefined) serve(workerData);
