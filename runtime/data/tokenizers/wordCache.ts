/** Remembers the ids of words: most words of a text are frequent ones. */
import type { WordModel } from "./models.ts";

/** Words of a cache, and the longest word that enters it, in UTF-16 units. */
const [MOST, LONGEST] = [2 ** 17, 48];

/** Returns a model that computes each frequent word once. */
export function cached(model: WordModel): WordModel {
  let known = new Map<string, readonly number[]>();
  return (word, into) => {
    if (word.length > LONGEST) return model(word, into);
    let ids = known.get(word);
    if (ids === undefined) {
      const fresh: number[] = [];
      model(word, fresh);
      if (known.size >= MOST) known = new Map();
      known.set(word, fresh);
      ids = fresh;
    }
    for (const id of ids) into.push(id);
  };
}
