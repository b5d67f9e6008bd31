/**
 * The order in which samples come from several sources, as in Megatron Core's BlendedDataset: each sample comes from the source that is
 * furthest behind its weight.
 */

/** Sample `s` of the blend is sample `index` of a source. */
export interface BlendedSample {
  readonly source: number;
  readonly index: number;
}

/** Samples between two remembered states. */
const STRIDE = 2 ** 14;

/** Returns the function that finds a sample of the blend. It walks on from the last remembered state: a step further costs one comparison. */
export function blendOf(weights: readonly number[]): (sample: number) => BlendedSample {
  const sum = weights.reduce((all, weight) => all + weight, 0);
  const shares = weights.map((weight) => weight / sum);
  /** How many samples of each source were used before sample k x STRIDE. */
  const states: number[][] = [weights.map(() => 0)];
  let chunk: { readonly begin: number; readonly samples: readonly BlendedSample[] } = { begin: -1, samples: [] };
  const walk = (from: number, used: number[]): BlendedSample[] =>
    Array.from({ length: STRIDE }, (_, i) => {
      const scale = Math.max(from + i, 1);
      let source = 0;
      let most = Number.NEGATIVE_INFINITY;
      for (const [k, share] of shares.entries()) {
        const behind = share * scale - (used[k] ?? 0);
        if (behind > most) [source, most] = [k, behind];
      }
      const index = used[source] ?? 0;
      used[source] = index + 1;
      return { source, index };
    });
  return (sample) => {
    const wanted = Math.floor(sample / STRIDE);
    while (states.length <= wanted) {
      const used = [...(states.at(-1) ?? [])];
      walk((states.length - 1) * STRIDE, used);
      states.push(used);
    }
    if (chunk.begin !== wanted * STRIDE) {
      const begin = wanted * STRIDE;
      chunk = { begin, samples: walk(begin, [...(states[wanted] ?? [])]) };
    }
    const found = chunk.samples[sample - chunk.begin];
    if (found === undefined) throw new Error(`rankc: the blend has no sample ${sample}`);
    return found;
  };
}
