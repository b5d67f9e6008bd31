/** Recognizes files that are neither plain text nor plain ids, by their first bytes or the extension of their name. */

interface Format {
  readonly name: string;
  readonly extensions: readonly string[];
  /** Bytes at the start of the file, or at `at`. At least four, so that ids of two bytes rarely match. */
  readonly magic: readonly (readonly number[])[];
  readonly at?: number;
  readonly fix: (path: string) => string;
}

const ascii = (text: string): readonly number[] => Array.from(text, (c) => c.charCodeAt(0));
const decompress = (tool: string) => (path: string) => `decompress it first: ${tool} ${path}`;
const extract = (path: string): string => `extract the text or the ids first; rankc reads one plain file, and ${path} is an archive`;
const tokenize = "write its token ids as u16 or u32, little-endian, one after the other, to a .bin file";
const column = (reader: string) => (path: string) => `write its text to a .txt file, or ${tokenize}; ${reader} reads ${path}`;
const prepare = (path: string): string =>
  `make a data set of it: rankc data prepare ${path} --tokenizer TOKENIZER --out PREFIX, and name PREFIX in data.sources`;
const tensor = (path: string): string => `${tokenize}: in Python, ids.astype("uint16").tofile("ids.bin") of the array in ${path}`;
const header = (dtype: string) => (path: string) =>
  `cut the header of 1024 bytes off: tail -c +1025 ${path} > ids.bin, and set data.format: tokens, data.dtype: ${dtype}`;

const formats: readonly Format[] = [
  {
    ...{ name: "gzip", extensions: ["gz", "tgz"], fix: decompress("gunzip -k") },
    // method 8; flags 0, or 8 if the name of the file follows
    magic: [
      [0x1f, 0x8b, 8, 0],
      [0x1f, 0x8b, 8, 8],
    ],
  },
  { name: "zstd", extensions: ["zst", "zstd"], magic: [[0x28, 0xb5, 0x2f, 0xfd]], fix: decompress("unzstd") },
  { name: "xz", extensions: ["xz"], magic: [[0xfd, ...ascii("7zXZ\0")]], fix: decompress("unxz -k") },
  { name: "bzip2", extensions: ["bz2"], magic: [ascii("1AY&SY")], at: 4, fix: decompress("bunzip2 -k") },
  { name: "LZ4", extensions: ["lz4"], magic: [[0x04, 0x22, 0x4d, 0x18]], fix: decompress("unlz4") },
  { name: "a zip archive", extensions: ["zip"], magic: [ascii("PK\x03\x04")], fix: extract },
  { name: "a 7z archive", extensions: ["7z"], magic: [[...ascii("7z"), 0xbc, 0xaf, 0x27, 0x1c]], fix: extract },
  { name: "a tar archive", extensions: ["tar"], magic: [ascii("ustar")], at: 257, fix: extract },
  { name: "Parquet", extensions: ["parquet"], magic: [ascii("PAR1")], fix: prepare },
  { name: "Arrow", extensions: ["arrow", "feather"], magic: [ascii("ARROW1")], fix: column("pyarrow.ipc") },
  { name: "Avro", extensions: ["avro"], magic: [ascii("Obj\x01")], fix: column("fastavro") },
  { name: "TFRecord", extensions: ["tfrecord", "tfrecords"], magic: [], fix: column("tensorflow.data.TFRecordDataset") },
  {
    ...{ name: "a pointer of Git LFS", extensions: [], magic: [ascii("version https://git-lfs.github.com/spec/v1")] },
    fix: (path) => `fetch the file itself: git lfs pull --include ${path}`,
  },
  { name: "SQLite", extensions: ["sqlite", "sqlite3"], magic: [ascii("SQLite format 3\0")], fix: column("sqlite3") },
  { name: "PDF", extensions: ["pdf"], magic: [ascii("%PDF-")], fix: column("pdftotext") },
  {
    ...{ name: "JSON", extensions: ["jsonl", "ndjson", "json"], magic: [] },
    fix: prepare,
  },
  { name: "a NumPy array", extensions: ["npy"], magic: [[0x93, ...ascii("NUMPY")]], fix: tensor },
  { name: "NumPy arrays", extensions: ["npz"], magic: [], fix: tensor },
  { name: "HDF5", extensions: ["h5", "hdf5"], magic: [[0x89, ...ascii("HDF\r\n\x1a\n")]], fix: tensor },
  { name: "a pickle of PyTorch or Python", extensions: ["pt", "pth", "pkl", "pickle"], magic: [], fix: tensor },
  { name: "safetensors", extensions: ["safetensors"], magic: [], fix: tensor },
  {
    ...{ name: "the index of a Megatron data set", extensions: ["idx"], magic: [ascii("MMIDIDX\0\0")] },
    fix: (path) => `name the file of its ids: ${path.replace(/\.idx$/i, "")}.bin`,
  },
  // https://github.com/karpathy/llm.c, dev/data/data_common.py: magic number and version 1 as i32
  { name: "ids with a header of llm.c", extensions: [], magic: [[0x88, 0xd8, 0x34, 0x01, 1, 0, 0, 0]], fix: header("u16") },
  { name: "ids with a header of llm.c", extensions: [], magic: [[0xa1, 0xd9, 0x34, 0x01, 1, 0, 0, 0]], fix: header("u32") },
];

/** The number of bytes of a file that `formatOf` reads. */
export const HEAD = 4096;

/** A recognised file format. */
export interface Found {
  /** The name of the format, as in "looks like …". */
  readonly name: string;
  readonly fix: string;
}

/** Returns the format of a file by its first bytes, else by its name; undefined if it may be plain text or ids. */
export function formatOf(path: string, head: Uint8Array): Found | undefined {
  const extension = /\.([^./\\]+)$/.exec(path)?.[1]?.toLowerCase() ?? "";
  const found =
    formats.find(({ magic, at = 0 }) => magic.some((bytes) => bytes.every((byte, i) => head[at + i] === byte))) ??
    formats.find(({ extensions }) => extensions.includes(extension));
  return found && { name: found.name, fix: found.fix(path) };
}

/** Recognizes a text of another encoding, or ids, that are read as text: by a byte order mark, or by many zero bytes. */
export function wideTextOf(path: string, head: Uint8Array): Found | undefined {
  const marked = head[0] === 0xff && head[1] === 0xfe ? "UTF-16LE" : head[0] === 0xfe && head[1] === 0xff ? "UTF-16BE" : undefined;
  const recoded = (from: string) => `write it as UTF-8: iconv -f ${from} -t UTF-8 ${path} > corpus.txt`;
  if (marked) return { name: "UTF-16 text", fix: recoded("UTF-16") };
  const zerosAt = (parity: number): number => head.filter((byte, i) => byte === 0 && i % 2 === parity).length;
  const [even, odd] = [zerosAt(0), zerosAt(1)];
  if (10 * (even + odd) <= head.length) return undefined;
  const ids = "or, if it holds token ids, set data.format: tokens and data.dtype";
  if (even === 0 || odd === 0) return { name: "UTF-16 text or token ids", fix: `${recoded(even === 0 ? "UTF-16LE" : "UTF-16BE")}; ${ids}` };
  return { name: "binary data: many of its bytes are 0", fix: `name a text in UTF-8; ${ids}` };
}

/**
 * Returns the index of the first invalid UTF-8 sequence (RFC 3629), or undefined if all are valid. A slice of a text may begin and end
 * inside a character; `first` and `last`: the slice is the begin or the end of the text.
 */
export function invalidUtf8(bytes: Uint8Array, { first, last }: { readonly first: boolean; readonly last: boolean }): number | undefined {
  let i = 0;
  if (!first) while (i < 3 && isContinuation(bytes[i])) i++;
  while (i < bytes.length) {
    const lead = bytes[i]!;
    if (lead < 0x80) {
      i++;
      continue;
    }
    const following = lead < 0xc2 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : lead < 0xf5 ? 3 : 0;
    if (following === 0) return i;
    for (let k = 1; k <= following; k++) {
      if (i + k === bytes.length) return last ? i : undefined;
      if (!isContinuation(bytes[i + k])) return i;
    }
    // the shortest form, no surrogates, nothing above U+10FFFF
    const second = bytes[i + 1]!;
    if (lead === 0xe0 ? second < 0xa0 : lead === 0xed ? second > 0x9f : lead === 0xf0 ? second < 0x90 : lead === 0xf4 && second > 0x8f)
      return i;
    i += following + 1;
  }
  return undefined;
}

const isContinuation = (byte: number | undefined): boolean => byte !== undefined && (byte & 0xc0) === 0x80;
