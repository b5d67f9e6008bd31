import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, expect, test } from "vitest";
import { openSafetensors, writeSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { Trouble } from "../../schemas/trouble.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-safetensors-"));
afterAll(() => rmSync(folder, { recursive: true }));
const path = join(folder, "a.safetensors");

/** A file with this header, however wrong, and these data bytes. */
function write(header: unknown, data: Uint8Array | number, length?: bigint): void {
  const text = Buffer.from(typeof header === "string" ? header : JSON.stringify(header));
  const first = Buffer.alloc(8);
  first.writeBigUInt64LE(length ?? BigInt(text.length));
  writeFileSync(path, Buffer.concat([first, text, typeof data === "number" ? Buffer.alloc(data) : data]));
}

function complaint(body: () => unknown): string {
  try {
    body();
  } catch (error) {
    expect(error).toBeInstanceOf(Trouble);
    expect((error as Trouble).fix).toBeTruthy();
    return (error as Trouble).message.replaceAll(folder, "DIR");
  }
  throw new Error("nothing was said");
}
const openAll = (at: string): void => {
  const file = openSafetensors(at);
  try {
    for (const name of file.names) file.read(name);
  } finally {
    file.close();
  }
};

test("tensors are read back bit for bit, and the folder holds no other file", () => {
  const entry = fc.record({
    name: fc.string().filter((name) => name !== "__metadata__"),
    data: fc.float32Array({ maxLength: 20 }),
  });
  fc.assert(
    fc.property(fc.uniqueArray(entry, { selector: ({ name }) => name, maxLength: 6 }), (entries) => {
      writeSafetensors(
        path,
        entries.map(({ name, data }) => ({ name, dtype: "F32", shape: [1, data.length], data })),
      );
      const file = openSafetensors(path);
      expect([...file.names].sort()).toEqual(entries.map(({ name }) => name).sort());
      for (const { name, data } of entries) {
        expect(file.info(name).start % 4).toBe(0);
        expect(file.info(name).shape).toEqual([1, data.length]);
        expect(Buffer.from(file.read(name).buffer)).toEqual(Buffer.from(data.slice().buffer));
      }
      file.close();
      expect(readdirSync(folder)).toEqual(["a.safetensors"]);
    }),
    { numRuns: 50 },
  );
});

test("written files have format pt in their metadata, which older transformers need", () => {
  writeSafetensors(path, [{ name: "a", dtype: "F32", shape: [1], data: Float32Array.of(1) }]);
  const bytes = readFileSync(path);
  const header = JSON.parse(bytes.toString("utf8", 8, 8 + Number(bytes.readBigUInt64LE())));
  expect(header.__metadata__).toEqual({ format: "pt" });
  expect(openSafetensors(path).names).toEqual(["a"]);
});

test("a file truncated anywhere is a Trouble, never another error", () => {
  const small = join(folder, "whole.safetensors");
  writeSafetensors(small, [
    { name: "a", dtype: "F32", shape: [2, 3], data: new Float32Array(6) },
    { name: "b", dtype: "F32", shape: [3], data: new Float32Array(3) },
  ]);
  const whole = readFileSync(small);
  rmSync(small);
  for (let length = 0; length < whole.length; length++) {
    writeFileSync(path, whole.subarray(0, length));
    complaint(() => openAll(path));
  }
});

test("a flipped byte in length or header is a Trouble or a readable file, never another error", () => {
  const whole = readFileSync("test/fixtures/hf/mixtral-tiny/model.safetensors").subarray(0, 4000);
  const header = Number(whole.readBigUInt64LE());
  fc.assert(
    fc.property(fc.nat(7 + header), fc.nat(255), (at, byte) => {
      const bent = Buffer.from(whole);
      bent[at] = byte;
      writeFileSync(path, bent);
      complaint(() => openAll(path));
    }),
    { numRuns: 200 },
  );
});

test("each inconsistency of a file has its message", () => {
  const one = (entry: object, data = 8): string => {
    write({ t: { dtype: "F32", shape: [2], data_offsets: [0, 8], ...entry } }, data);
    return complaint(() => openSafetensors(path));
  };
  write("{}", 0, 1000n);
  const messages = [complaint(() => openSafetensors(path))];
  write("{}", 0, 2n ** 63n);
  messages.push(complaint(() => openSafetensors(path)));
  write("{nonsense", 0);
  messages.push(complaint(() => openSafetensors(path)));
  write([1], 0);
  messages.push(complaint(() => openSafetensors(path)));
  messages.push(one({ dtype: "F7" }), one({ dtype: "toString" }), one({ shape: [-2] }), one({ shape: [3] }));
  messages.push(one({ data_offsets: [8, 0] }), one({}, 7), one({}, 9), one({ data_offsets: [4, 12] }, 12));
  write({ a: { dtype: "U8", shape: [6], data_offsets: [0, 6] }, b: { dtype: "U8", shape: [6], data_offsets: [2, 8] } }, 8);
  messages.push(complaint(() => openSafetensors(path)));
  messages.push(
    complaint(() => openSafetensors(folder)),
    complaint(() => openSafetensors(join(folder, "no"))),
  );
  expect(messages.join("\n")).toMatchInlineSnapshot(`
    "DIR/a.safetensors: the header should end at byte 1008, the file ends at 10: it was cut
    DIR/a.safetensors: claims a header of 9223372036854775808 bytes, over the format's 100 MB: not a safetensors file
    DIR/a.safetensors: the header is not JSON: not a safetensors file, or a damaged one
    DIR/a.safetensors: the header is not a JSON object
    DIR/a.safetensors: tensor t has dtype "F7", which rankc does not read
    DIR/a.safetensors: tensor t has dtype "toString", which rankc does not read
    DIR/a.safetensors: tensor t has no valid shape: [-2]
    DIR/a.safetensors: tensor t has 8 bytes; F32 [3] takes 12
    DIR/a.safetensors: tensor t has no valid data_offsets: [8,0]
    DIR/a.safetensors: tensor t should end at byte 70, the file ends at 69: it was cut
    DIR/a.safetensors: the tensors end at byte 70, the file at 71
    DIR/a.safetensors: tensor t leaves 4 unused bytes after the header
    DIR/a.safetensors: tensor b overlaps a by 4 bytes
    DIR: the safetensors file is a directory
    DIR/no: the safetensors file does not exist"
  `);
});

test("all stored types are read as the numbers they mean", () => {
  const stored: [string, ArrayBufferView][] = [
    ["F64", new Float64Array([1.5, -2])],
    ["F32", new Float32Array([1.5, -2])],
    ["F16", new Uint16Array([0x3e00, 0xc000])],
    ["BF16", new Uint16Array([0x3fc0, 0xc000])],
    // 1.1 x 2^0 and -1.0 x 2^1, bias 7
    ["F8_E4M3", new Uint8Array([0b00111100, 0b11000000])],
    ["I64", new BigInt64Array([7n, -2n])],
    ["I32", new Int32Array([7, -2])],
    ["U8", new Uint8Array([7, 254])],
  ];
  for (const [dtype, view] of stored) {
    write({ t: { dtype, shape: [2], data_offsets: [0, view.byteLength] } }, new Uint8Array(view.buffer));
    const file = openSafetensors(path);
    const isInt = dtype.startsWith("I") || dtype.startsWith("U");
    expect([...file.read("t")]).toEqual([isInt ? 7 : 1.5, dtype === "U8" ? 254 : -2]);
    if (isInt) expect([...file.readInts("t")]).toEqual([7, dtype === "U8" ? 254 : -2]);
    else expect(complaint(() => file.readInts("t"))).toContain("not integers");
    file.close();
  }
  write(
    { t: { dtype: "F16", shape: [4], data_offsets: [0, 8] } },
    new Uint8Array(new Uint16Array([0x0001, 0x7c00, 0x7e00, 0xfbff]).buffer),
  );
  expect([...openSafetensors(path).read("t")]).toEqual([2 ** -24, Number.POSITIVE_INFINITY, Number.NaN, -65504]);
  write({ t: { dtype: "I64", shape: [1], data_offsets: [0, 8] } }, new Uint8Array(new BigInt64Array([2n ** 40n]).buffer));
  expect(complaint(() => openSafetensors(path).readInts("t"))).toContain("which 32 bits do not");
});

test("a write that fails leaves the old file and nothing beside it", () => {
  writeFileSync(path, "old");
  const entries = [{ name: "a", dtype: "F32" as const, shape: [3], data: new Float32Array(2) }];
  expect(() => writeSafetensors(path, entries)).toThrow("2 values for shape [3]");
  expect(readFileSync(path, "utf8")).toBe("old");
  expect(complaint(() => writeSafetensors(join(folder, "no", "b"), []))).toContain("cannot be written: the folder does not exist (ENOENT)");
  expect(complaint(() => writeSafetensors(folder, []))).toContain("cannot be written");
  expect(readdirSync(folder)).toEqual(["a.safetensors"]);
});
