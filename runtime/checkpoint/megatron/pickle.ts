/**
 * Reads Python pickles as data: only the opcodes that checkpoints of PyTorch and Megatron Core use, and without executing anything. A class
 * or a function is a name; its result is a record of name, arguments and state.
 */
import { Trouble } from "../../../schemas/trouble.ts";

/** What a pickle makes of a class or a function: never executed. */
export class PickledObject {
  /** Fields, entries and items that were added after it was made. */
  readonly fields = new Map<PickleValue, PickleValue>();
  state: PickleValue = null;

  constructor(
    /** `module.name`. */
    readonly type: string,
    readonly args: readonly PickleValue[],
  ) {}
}

/** The name of a class or a function. */
export class PickledName {
  constructor(readonly name: string) {}
}

/** A reference to an object outside of the pickle. */
export class PersistentId {
  constructor(readonly id: PickleValue) {}
}

/** A value of a pickle. A tuple and a list are both arrays; an integer beyond 2^53 is a bigint. */
export type PickleValue =
  | null
  | boolean
  | number
  | bigint
  | string
  | Uint8Array
  | PickleValue[]
  | Map<PickleValue, PickleValue>
  | PickledObject
  | PickledName
  | PersistentId;

const MARK = Symbol("mark");
type Entry = PickleValue | typeof MARK;

/** The most values of a pickle: a file of a few bytes could otherwise ask for any amount of memory. */
const MOST_VALUES = 50_000_000;

/** Reads one pickle. Throws a Trouble that names `where` for an opcode that checkpoints do not have, and for a damaged pickle. */
export function readPickle(bytes: Uint8Array, where: string): PickleValue {
  return new Unpickler(bytes, where).read();
}

class Unpickler {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  readonly #where: string;
  readonly #memo = new Map<number, PickleValue>();
  #stack: Entry[] = [];
  #at = 0;
  #values = 0;

  constructor(bytes: Uint8Array, where: string) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.#where = where;
  }

  read(): PickleValue {
    try {
      for (;;) {
        const op = this.#take(1)[0] ?? 0;
        // STOP
        if (op === 0x2e) return this.#pop();
        const run = opcodes.get(op);
        if (!run) throw this.#damaged(`opcode 0x${op.toString(16)} at byte ${this.#at - 1}, which checkpoints do not have`);
        run(this.#machine);
        if (++this.#values > MOST_VALUES) throw this.#damaged("more values than a checkpoint has");
      }
    } catch (error) {
      if (error instanceof RangeError) throw this.#damaged("an end before its last value");
      throw error;
    }
  }

  readonly #machine: Machine = {
    take: (n) => this.#take(n),
    u8: () => this.#view.getUint8(this.#skip(1)),
    u16: () => this.#view.getUint16(this.#skip(2), true),
    i32: () => this.#view.getInt32(this.#skip(4), true),
    u32: () => this.#view.getUint32(this.#skip(4), true),
    u64: () => Number(this.#view.getBigUint64(this.#skip(8), true)),
    f64: () => this.#view.getFloat64(this.#skip(8), false),
    line: () => this.#line(),
    push: (value) => void this.#stack.push(value),
    mark: () => void this.#stack.push(MARK),
    pop: () => this.#pop(),
    popToMark: () => this.#popToMark(),
    top: () => {
      const value = this.#pop();
      this.#stack.push(value);
      return value;
    },
    memoize: (index) => void this.#memo.set(index ?? this.#memo.size, this.#machine.top()),
    recall: (index) => {
      const value = this.#memo.get(index);
      if (value === undefined) throw this.#damaged(`a reference to a value ${index} that it does not have`);
      this.#stack.push(value);
    },
    fail: (what) => {
      throw this.#damaged(what);
    },
  };

  #skip(n: number): number {
    const at = this.#at;
    this.#at += n;
    return at;
  }

  #take(n: number): Uint8Array {
    const at = this.#skip(n);
    if (this.#at > this.#bytes.length) throw new RangeError();
    return this.#bytes.subarray(at, at + n);
  }

  #line(): string {
    const end = this.#bytes.indexOf(0x0a, this.#at);
    if (end < 0) throw new RangeError();
    const text = utf8(this.#bytes.subarray(this.#at, end));
    this.#at = end + 1;
    return text;
  }

  #pop(): PickleValue {
    const value = this.#stack.pop();
    if (value === undefined || value === MARK) throw this.#damaged("an opcode without its operand");
    return value;
  }

  #popToMark(): PickleValue[] {
    const at = this.#stack.lastIndexOf(MARK);
    if (at < 0) throw this.#damaged("an opcode without its mark");
    const values = this.#stack.splice(at).slice(1);
    return values as PickleValue[];
  }

  #damaged(what: string): Trouble {
    return new Trouble(`${this.#where}: the pickle has ${what}`, "name a checkpoint that Megatron Core wrote; copy it again if it is one");
  }
}

interface Machine {
  take(n: number): Uint8Array;
  u8(): number;
  u16(): number;
  i32(): number;
  u32(): number;
  u64(): number;
  f64(): number;
  line(): string;
  push(value: PickleValue): void;
  mark(): void;
  pop(): PickleValue;
  popToMark(): PickleValue[];
  top(): PickleValue;
  memoize(index?: number): void;
  recall(index: number): void;
  fail(what: string): never;
}

const utf8 = (bytes: Uint8Array): string => new TextDecoder("utf-8").decode(bytes);

/** Reads a little-endian integer in two's complement. */
function longOf(bytes: Uint8Array): number | bigint {
  let value = 0n;
  for (const [i, byte] of bytes.entries()) value |= BigInt(byte) << BigInt(8 * i);
  const last = bytes.at(-1) ?? 0;
  if (last & 0x80) value -= 1n << BigInt(8 * bytes.length);
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}

function setItems(target: PickleValue, items: readonly PickleValue[], fail: Machine["fail"]): void {
  const map = target instanceof Map ? target : target instanceof PickledObject ? target.fields : fail("entries of a value that has none");
  for (let i = 0; i + 1 < items.length; i += 2) map.set(items[i] ?? null, items[i + 1] ?? null);
}

function append(target: PickleValue, items: readonly PickleValue[], fail: Machine["fail"]): void {
  if (Array.isArray(target)) for (const item of items) target.push(item);
  else if (target instanceof PickledObject) for (const item of items) target.fields.set(target.fields.size, item);
  else fail("items of a value that is no list");
}

function build(target: PickleValue, state: PickleValue, fail: Machine["fail"]): void {
  if (!(target instanceof PickledObject)) fail("a state of a value that has none");
  target.state = state;
  if (state instanceof Map) for (const [key, value] of state) target.fields.set(key, value);
}

function make(type: PickleValue, args: PickleValue, fail: Machine["fail"]): PickleValue {
  if (!(type instanceof PickledName)) return fail("a call of a value that is no name");
  if (!Array.isArray(args)) return fail("a call without a tuple of arguments");
  return new PickledObject(type.name, args);
}

/** The opcodes of pickle protocols 2 to 4 that checkpoints have, by the names of Python's pickletools. */
const opcodes = new Map<number, (m: Machine) => void>([
  // PROTO, FRAME
  [0x80, (m) => void (m.u8() > 5 && m.fail("a protocol that is not known"))],
  [0x95, (m) => void m.u64()],
  // NONE, NEWTRUE, NEWFALSE
  [0x4e, (m) => m.push(null)],
  [0x88, (m) => m.push(true)],
  [0x89, (m) => m.push(false)],
  // BININT, BININT1, BININT2, LONG1, BINFLOAT
  [0x4a, (m) => m.push(m.i32())],
  [0x4b, (m) => m.push(m.u8())],
  [0x4d, (m) => m.push(m.u16())],
  [0x8a, (m) => m.push(longOf(m.take(m.u8())))],
  [0x47, (m) => m.push(m.f64())],
  // BINUNICODE, SHORT_BINUNICODE, SHORT_BINBYTES, BINBYTES
  [0x58, (m) => m.push(utf8(m.take(m.u32())))],
  [0x8c, (m) => m.push(utf8(m.take(m.u8())))],
  [0x43, (m) => m.push(m.take(m.u8()))],
  [0x42, (m) => m.push(m.take(m.u32()))],
  // EMPTY_LIST, EMPTY_TUPLE, EMPTY_DICT, EMPTY_SET, MARK
  [0x5d, (m) => m.push([])],
  [0x29, (m) => m.push([])],
  [0x7d, (m) => m.push(new Map())],
  [0x8f, (m) => m.push([])],
  [0x28, (m) => m.mark()],
  // TUPLE, TUPLE1, TUPLE2, TUPLE3
  [0x74, (m) => m.push(m.popToMark())],
  [0x85, (m) => m.push([m.pop()])],
  [0x86, (m) => m.push([m.pop(), m.pop()].reverse())],
  [0x87, (m) => m.push([m.pop(), m.pop(), m.pop()].reverse())],
  // APPEND, APPENDS, ADDITEMS, SETITEM, SETITEMS
  [
    0x61,
    (m) => {
      const item = m.pop();
      append(m.top(), [item], m.fail);
    },
  ],
  [
    0x65,
    (m) => {
      const items = m.popToMark();
      append(m.top(), items, m.fail);
    },
  ],
  [
    0x90,
    (m) => {
      const items = m.popToMark();
      append(m.top(), items, m.fail);
    },
  ],
  [
    0x73,
    (m) => {
      const [value, key] = [m.pop(), m.pop()];
      setItems(m.top(), [key, value], m.fail);
    },
  ],
  [
    0x75,
    (m) => {
      const items = m.popToMark();
      setItems(m.top(), items, m.fail);
    },
  ],
  // GLOBAL, STACK_GLOBAL
  [0x63, (m) => m.push(new PickledName(`${m.line()}.${m.line()}`))],
  [
    0x93,
    (m) => {
      const [name, module] = [m.pop(), m.pop()];
      m.push(new PickledName(`${module}.${name}`));
    },
  ],
  // REDUCE, NEWOBJ, BUILD, BINPERSID
  [
    0x52,
    (m) => {
      const [args, type] = [m.pop(), m.pop()];
      m.push(make(type, args, m.fail));
    },
  ],
  [
    0x81,
    (m) => {
      const [args, type] = [m.pop(), m.pop()];
      m.push(make(type, args, m.fail));
    },
  ],
  [
    0x62,
    (m) => {
      const state = m.pop();
      build(m.top(), state, m.fail);
    },
  ],
  [0x51, (m) => m.push(new PersistentId(m.pop()))],
  // MEMOIZE, BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
  [0x94, (m) => m.memoize()],
  [0x71, (m) => m.memoize(m.u8())],
  [0x72, (m) => m.memoize(m.u32())],
  [0x68, (m) => m.recall(m.u8())],
  [0x6a, (m) => m.recall(m.u32())],
]);
