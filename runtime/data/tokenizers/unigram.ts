/** The most probable split of a text into pieces (Viterbi), each piece with a logarithm of its probability. */

/** A piece of the vocabulary. */
export interface ScoredPiece {
  readonly text: string;
  readonly id: number;
  readonly score: number;
}
/** How a model scores and adds. */
export interface UnigramRules {
  /** The score of a character without a piece. */
  readonly unknownScore: number;
  /** Rounds a sum of scores: SentencePiece adds in float32, Hugging Face in float64. Ties depend on it. */
  readonly round: (sum: number) => number;
}
/** A part of the split; `id` is undefined for a character without a piece. */
export type SplitPiece = { readonly text: string; readonly id: number | undefined };

/** Returns the splitter. Of splits with equal sums it takes the one that the reference takes: later pieces must be better, not as good. */
export function splitterOf(pieces: Iterable<ScoredPiece>, { unknownScore, round }: UnigramRules): (text: string) => SplitPiece[] {
  const trie = new PieceTrie(pieces);
  return (text) => {
    const size = text.length;
    const best = new Float64Array(size + 1);
    const starts = new Int32Array(size + 1).fill(-1);
    const ids = new Int32Array(size + 1);
    for (let at = 0; at < size; ) {
      const width = (text.codePointAt(at) ?? 0) > 0xffff ? 2 : 1;
      const here = best[at] ?? 0;
      let hasCharacter = false;
      let node = 0;
      for (let end = at; end < size; ) {
        node = trie.child(node, text.charCodeAt(end++));
        if (node < 0) break;
        const id = trie.idAt(node);
        if (id < 0) continue;
        const sum = round(trie.scoreAt(node) + here);
        if (starts[end] === -1 || sum > (best[end] ?? 0)) {
          best[end] = sum;
          starts[end] = at;
          ids[end] = id;
        }
        if (end === at + width) hasCharacter = true;
      }
      const end = at + width;
      const sum = round(unknownScore + here);
      if (!hasCharacter && (starts[end] === -1 || sum > (best[end] ?? 0))) {
        best[end] = sum;
        starts[end] = at;
        ids[end] = -1;
      }
      at = end;
    }
    const found: SplitPiece[] = [];
    for (let end = size; end > 0; ) {
      const start = starts[end] ?? 0;
      const id = ids[end] ?? -1;
      found.push({ text: text.slice(start, end), id: id < 0 ? undefined : id });
      end = start;
    }
    return found.reverse();
  };
}

/** Pieces by their UTF-16 units: nodes are numbers, edges a hash table with open addressing. */
class PieceTrie {
  private readonly parents: Int32Array;
  private readonly units: Uint16Array;
  private readonly targets: Int32Array;
  private readonly mask: number;
  private readonly ids: Int32Array;
  private readonly scores: Float64Array;
  private nodes = 1;

  constructor(pieces: Iterable<ScoredPiece>) {
    const all = [...pieces];
    const most = all.reduce((sum, { text }) => sum + text.length, 1);
    const size = 2 ** Math.ceil(Math.log2(2 * most + 2));
    this.mask = size - 1;
    this.parents = new Int32Array(size).fill(-1);
    this.units = new Uint16Array(size);
    this.targets = new Int32Array(size);
    this.ids = new Int32Array(most).fill(-1);
    this.scores = new Float64Array(most);
    for (const { text, id, score } of all) {
      let node = 0;
      for (let i = 0; i < text.length; i++) node = this.grown(node, text.charCodeAt(i));
      this.ids[node] = id;
      this.scores[node] = score;
    }
  }
  private place(node: number, unit: number): number {
    let at = (Math.imul(node, 0x9e3779b1) ^ Math.imul(unit, 0x85ebca6b)) >>> 0;
    at = (at ^ (at >>> 15)) & this.mask;
    while (this.parents[at] !== -1 && (this.parents[at] !== node || this.units[at] !== unit)) at = (at + 1) & this.mask;
    return at;
  }
  private grown(node: number, unit: number): number {
    const at = this.place(node, unit);
    if (this.parents[at] === -1) {
      this.parents[at] = node;
      this.units[at] = unit;
      this.targets[at] = this.nodes++;
    }
    return this.targets[at] ?? 0;
  }
  /** Returns the node behind an edge; -1 if there is none. */
  child(node: number, unit: number): number {
    const at = this.place(node, unit);
    return this.parents[at] === -1 ? -1 : (this.targets[at] ?? -1);
  }
  /** Returns the piece that ends at a node; -1 if none does. */
  idAt(node: number): number {
    return this.ids[node] ?? -1;
  }
  scoreAt(node: number): number {
    return this.scores[node] ?? 0;
  }
}
