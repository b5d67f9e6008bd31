/** Documents that share a sequence: where they begin, and which tokens are predicted across their ends. */
import { Trouble } from "../../schemas/trouble.ts";

/** How the ends of documents are found, and whether losses cross them. */
export interface DocumentReading {
  /** The token that ends a document; null: the one that the description of the data set names. */
  readonly end: number | null;
  /** Whether no loss crosses the end of a document. */
  readonly loss: boolean;
}

/** Whether the token `ahead` places after token i lies beyond the end of the document of token i. */
export type Crossing = (i: number, ahead: number) => boolean;

/** The documents of a batch: for each token the position in its sequence at which its document begins, and which predictions cross an end. */
export interface BatchDocuments {
  readonly documents: Int32Array;
  readonly crosses: Crossing;
}

/** Finds the documents of a batch of sequences. The token that ends a document is its last. Throws a Trouble if it is not known. */
export function documentsOf(ids: Int32Array, seq: number, { end, loss }: DocumentReading): BatchDocuments {
  if (end === null)
    throw new Trouble(
      "data.documents: no token is known to end a document",
      "set data.documents.end to its id; rankc data prepare writes it to PREFIX.json",
    );
  const documents = new Int32Array(ids.length);
  for (const i of documents.keys()) if (i % seq > 0) documents[i] = ids[i - 1] === end ? i % seq : (documents[i - 1] ?? 0);
  // also a token beyond the sequence is in another document if the last token of the sequence ends one
  const crosses: Crossing = (i, ahead) => {
    const last = Math.min(i + ahead - 1, i - (i % seq) + seq - 1);
    return documents[last] !== documents[i] || ids[last] === end;
  };
  return { documents, crosses: loss ? crosses : () => false };
}

/** A source of a blend. `end`: the token that ends its documents, if its description names one. */
interface NamedSource {
  readonly name: string;
  readonly end?: number | undefined;
}

/** Fills in the token that ends a document from the descriptions of the sources. Throws a Trouble if they have none, or several. */
export function documentsOfSources<D extends DocumentReading | undefined>(
  reading: D,
  sources: readonly NamedSource[],
): D | DocumentReading {
  if (reading === undefined || reading.end !== null) return reading;
  const fix = "set data.documents.end to the id of the token that ends a document";
  const ends = sources.map(({ name, end }) => {
    if (end !== undefined) return { name, end };
    throw new Trouble(`${name}: no token is known to end a document, and data.documents needs it`, fix);
  });
  const [first] = ends;
  const other = ends.find(({ end }) => end !== first?.end);
  if (first && other)
    throw new Trouble(`documents of ${first.name} end with token ${first.end}, those of ${other.name} with ${other.end}`, fix);
  return { end: first?.end ?? null, loss: reading.loss };
}
