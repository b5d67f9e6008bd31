/** Writes ustar archives. The bytes depend only on paths, modes and contents: entries are sorted, with a constant time and no owner. */

/** A file of an archive. */
export interface TarEntry {
  /** The relative path, with slashes. */
  readonly path: string;
  readonly executable: boolean;
  readonly read: () => Uint8Array;
}

/** 2000-01-01, in seconds; tar warns about very old times. */
const time = 946_684_800;
const block = 512;

/** Yields the bytes of an archive. Throws if a path is too long for the format. */
export function* tar(entries: readonly TarEntry[]): Generator<Uint8Array> {
  for (const { path, executable, read } of [...entries].sort((a, b) => (a.path < b.path ? -1 : 1))) {
    const bytes = read();
    yield header(path, executable ? 0o755 : 0o644, bytes.length);
    yield bytes;
    yield new Uint8Array((block - (bytes.length % block)) % block);
  }
  // two empty blocks end an archive
  yield new Uint8Array(2 * block);
}

/** POSIX.1-1988 ustar: fields are octal text, the checksum is taken with its own field as blanks. */
function header(path: string, mode: number, size: number): Uint8Array {
  const [prefix, name] = split(path);
  const out = Buffer.alloc(block);
  const octal = (value: number, at: number, length: number) => out.write(`${value.toString(8).padStart(length - 1, "0")}\0`, at, "latin1");
  out.write(name, 0, "utf8");
  octal(mode, 100, 8);
  octal(0, 108, 8);
  octal(0, 116, 8);
  octal(size, 124, 12);
  octal(time, 136, 12);
  out.write(" ".repeat(8), 148, "latin1");
  out.write("0", 156, "latin1");
  out.write("ustar\u000000", 257, "latin1");
  out.write(prefix, 345, "utf8");
  octal(
    out.reduce((sum, byte) => sum + byte, 0),
    148,
    7,
  );
  return out;
}

/** Splits a long path at a slash into the prefix field and the name field. */
function split(path: string): readonly [prefix: string, name: string] {
  if (Buffer.byteLength(path) <= 100) return ["", path];
  for (let at = path.indexOf("/"); at >= 0; at = path.indexOf("/", at + 1)) {
    const [prefix, name] = [path.slice(0, at), path.slice(at + 1)];
    if (Buffer.byteLength(prefix) <= 155 && Buffer.byteLength(name) <= 100) return [prefix, name];
  }
  throw new Error(`the path ${path} is too long for an archive`);
}
