/**
 * A data set while one process writes it: PREFIX.partial/ with the ids, the lengths of documents, and how far they go. The files of the data set
 * appear when all is written; until then the same command goes on where the last one stopped.
 */
import {
  closeSync,
  existsSync,
  fsyncSync,
  ftruncateSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { Trouble } from "../../../schemas/trouble.ts";
import { makeFolder, unwritten } from "../../../schemas/writing.ts";
import { type FileLock, lockFile, type Owner } from "../../lockFile.ts";
import { idxHeader, idxSections } from "./indexFile.ts";

const Progress = z.object({
  format: z.literal(1),
  /** Everything that decides the bytes of the data set, by name. */
  settings: z.record(z.string(), z.string()),
  after: z.object({ file: z.int(), at: z.number(), lines: z.number() }),
  idBytes: z.number(),
  documents: z.int(),
  empty: z.int(),
  textBytes: z.number(),
});
/** How far a data set is written. */
export type PreparedSoFar = Omit<z.output<typeof Progress>, "format" | "settings">;

const begin: PreparedSoFar = { after: { file: 0, at: 0, lines: 0 }, idBytes: 0, documents: 0, empty: 0, textBytes: 0 };

/** Files of a data set that is being written. */
export class PartialDataset {
  private readonly folder: string;
  private readonly files: { readonly ids: number; readonly lengths: number };
  private readonly open: number[];
  private readonly lock: FileLock;
  progress: PreparedSoFar = begin;

  /** Opens or resumes the writing. `restart`: drops what is there. Throws a Trouble if it belongs to other settings, or cannot be written. */
  constructor(
    private readonly prefix: string,
    private readonly settings: Readonly<Record<string, string>>,
    restart: boolean,
  ) {
    this.folder = `${prefix}.partial`;
    // beside the folder, which a new start and the end remove
    const lock = `${this.folder}.lock`;
    this.lock = lockFile(lock, (owner) => taken(prefix, lock, owner), prefix);
    try {
      this.files = this.opened(restart);
    } catch (error) {
      this.lock.release();
      throw error;
    }
    this.open = [this.files.ids, this.files.lengths];
  }

  /** Opens the files behind what is recorded. */
  private opened(restart: boolean): { readonly ids: number; readonly lengths: number } {
    if (restart) this.attempt(() => rmSync(this.folder, { recursive: true, force: true }));
    if (existsSync(this.path("progress.json"))) {
      this.progress = this.resumed();
      this.takeBackIds();
      this.expectBytes("ids", this.progress.idBytes);
      this.expectBytes("lengths", 4 * this.progress.documents);
    }
    this.attempt(() => makeFolder(this.folder));
    // an append never overwrites what the progress covers
    const files = {
      ids: this.attempt(() => openSync(this.path("ids"), "a+")),
      lengths: this.attempt(() => openSync(this.path("lengths"), "a+")),
    };
    this.attempt(() => {
      ftruncateSync(files.ids, this.progress.idBytes);
      ftruncateSync(files.lengths, 4 * this.progress.documents);
    });
    return files;
  }

  private readonly path = (name: string): string => join(this.folder, name);
  private attempt<T>(act: () => T): T {
    try {
      return act();
    } catch (error) {
      throw unwritten(this.prefix, error);
    }
  }

  private resumed(): PreparedSoFar {
    const again = "add --restart to begin again";
    let found: unknown;
    try {
      found = JSON.parse(readFileSync(this.path("progress.json"), "utf8"));
    } catch {
      throw new Trouble(`${this.path("progress.json")} is damaged`, again);
    }
    const { data } = Progress.safeParse(found);
    if (!data) throw new Trouble(`${this.path("progress.json")} is of another version of rankc`, again);
    const names = new Set([...Object.keys(data.settings), ...Object.keys(this.settings)]);
    const differing = [...names].filter((name) => data.settings[name] !== this.settings[name]);
    if (differing.length > 0)
      throw new Trouble(
        `${this.folder} was begun with another ${differing.slice(0, 3).join(", ")}${differing.length > 3 ? ` and ${differing.length - 3} more` : ""}`,
        `repeat the command that began it, or ${again}`,
      );
    return data;
  }

  /** A call that ended while it moved the files to their names may have moved the ids and not the index. */
  private takeBackIds(): void {
    const moved = `${this.prefix}.bin`;
    const isMoved = !existsSync(this.path("ids")) && existsSync(this.path("index")) && !existsSync(`${this.prefix}.idx`);
    if (isMoved && existsSync(moved)) this.attempt(() => renameSync(moved, this.path("ids")));
  }

  /** Throws a Trouble if a file is shorter than the record says: its missing end would read as zeros. */
  private expectBytes(name: string, bytes: number): void {
    const found = statSync(this.path(name), { throwIfNoEntry: false })?.size ?? 0;
    if (found < bytes) throw new Trouble(`${this.path(name)} has ${found} of ${bytes} bytes`, "add --restart to begin again");
  }

  /** Appends a block: its ids as they are written, and the lengths of its documents. */
  append(ids: Uint8Array, lengths: Int32Array, soFar: PreparedSoFar): void {
    this.attempt(() => {
      write(this.files.ids, ids);
      write(this.files.lengths, new Uint8Array(lengths.buffer, lengths.byteOffset, lengths.byteLength));
    });
    this.progress = soFar;
  }

  /** Records how far the files go, so that a later command resumes there. */
  record(): void {
    this.attempt(() => {
      fsyncSync(this.files.ids);
      fsyncSync(this.files.lengths);
      writeFileSync(this.path("progress.new"), JSON.stringify({ format: 1, settings: this.settings, ...this.progress }));
      renameSync(this.path("progress.new"), this.path("progress.json"));
    });
  }

  /** Records how far the files go and closes them. */
  pause(): void {
    this.record();
    this.close();
    this.lock.release();
  }

  /** Writes the index and the description, and moves all files to their names. The index, which makes the data set whole, comes last. */
  finish(dtype: "u16" | "i32", description: string): void {
    this.record();
    this.attempt(() => {
      const bytes = readFileSync(this.path("lengths"));
      const lengths = new Int32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
      const index = openSync(this.path("index"), "w");
      write(index, idxHeader(dtype, lengths.length));
      for (const section of idxSections(dtype, lengths)) write(index, section);
      fsyncSync(index);
      closeSync(index);
      writeFileSync(this.path("description"), description);
      rmSync(`${this.prefix}.idx`, { force: true });
      renameSync(this.path("ids"), `${this.prefix}.bin`);
      renameSync(this.path("description"), `${this.prefix}.json`);
      renameSync(this.path("index"), `${this.prefix}.idx`);
    });
    this.close();
    this.attempt(() => rmSync(this.folder, { recursive: true, force: true }));
    this.lock.release();
  }

  /** Closes the files after an error. What was recorded stays for the next call; a folder without a record is removed. */
  abandon(): void {
    this.close();
    if (!existsSync(this.path("progress.json"))) rmSync(this.folder, { recursive: true, force: true });
    this.lock.release();
  }

  private close(): void {
    for (const file of this.open.splice(0)) closeSync(file);
  }
}

const taken = (prefix: string, path: string, { host, pid, since }: Owner): Trouble =>
  new Trouble(
    `${prefix}: another rankc data prepare writes it: process ${pid} on ${host}, since ${since}`,
    `wait for it, or name another data set after -o; if that process has ended, remove ${path}`,
  );

function write(file: number, bytes: Uint8Array): void {
  for (let at = 0; at < bytes.length; ) at += writeSync(file, bytes, at);
}
