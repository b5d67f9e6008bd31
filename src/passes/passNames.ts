/** The stages of the compiler that have a text form, in the order in which they run, and what each form shows. */
const texts = {
  job: "the job with every default filled in",
  mesh: "the grids of ranks and their groups",
  pipeline: "the layers of each stage and chunk",
  model: "the forward graph on whole tensors",
  graph: "the graph with gradients and recomputed values",
  sharded: "ops on shards, and reshards",
  schedule: "the order of microbatches on each stage",
  program: "the instructions of each stage",
  kernels: "kernels and their launches",
  memory: "offsets and the peak",
  plan: "the plan as written in plan.txt",
} as const;

/** The name of a compiler stage, as `--emit` takes it. */
export type Stage = keyof typeof texts;
/** The names of all stages, in the order in which they run. */
export const stages = Object.keys(texts) as [Stage, ...Stage[]];
/** What the text form of each stage shows, for help. */
export const stageTexts: Readonly<Record<Stage, string>> = texts;

/** Numbers that describe the result of a pass: ops, collectives, buffers. */
export type Counts = Readonly<Record<string, number>>;
/** Runs a pass. Tracing measures it and counts its result; `untraced` only runs it. */
export type Trace = <T>(pass: Stage | "verify", run: () => T, count?: (result: T) => Counts) => T;

/** Runs passes without measuring them. */
export const untraced: Trace = (_, run) => run();

/** Returns a trace that reports one line a pass: its time, and with `changes` each count that it changed, before → after. */
export function tracePasses(report: (line: string) => void, { changes }: { readonly changes: boolean }): Trace {
  const known = new Map<string, number>();
  return (pass, run, count) => {
    const began = performance.now();
    const result = run();
    const time = `pass ${pass.padEnd(8)} ${(performance.now() - began).toFixed(1).padStart(8)} ms`;
    const lines = Object.entries(changes && count ? count(result) : {}).flatMap(([name, n]) => {
      const before = known.get(name) ?? 0;
      known.set(name, n);
      return n === before ? [] : [`${name} ${before} → ${n}`];
    });
    report([time, ...lines].join("  "));
    return result;
  };
}
