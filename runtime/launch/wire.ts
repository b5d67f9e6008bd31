/**
 * The TCP protocol between rank 0 and its peers. A frame: the magic, the byte lengths of message and data (u32 each, little-endian), the
 * message as JSON, the data. An invalid frame closes the connection.
 */
import { createHmac, timingSafeEqual } from "node:crypto";
import type { Socket } from "node:net";
import { z } from "zod";

const rank = z.int().min(0).max(1_000_000);
const name = z.string().min(1).max(1000);
const text = z.string().max(20_000);

/** Messages from a peer to the hub. */
export const ToHub = z.discriminatedUnion("kind", [
  z.strictObject({
    kind: z.literal("hello"),
    /** Proves the token: HMAC-SHA-256 over the hub's nonce. */
    proof: z.string().max(64),
    rank: z.int(),
    world: z.int(),
    version: name,
    plan: name,
    host: name,
    pid: z.int(),
  }),
  z.strictObject({ kind: z.literal("share"), name, members: z.array(rank) }),
  z.strictObject({ kind: z.literal("barrier"), name, problem: text.optional() }),
  z.strictObject({ kind: z.literal("beat"), reports: z.int(), step: z.int(), text }),
  z.strictObject({ kind: z.literal("fail"), text, step: z.int(), at: text }),
  z.strictObject({ kind: z.literal("stop") }),
  z.strictObject({ kind: z.literal("begun"), step: z.int() }),
  z.strictObject({ kind: z.literal("bye") }),
]);
/** A value of the schema `ToHub`. */
export type ToHub = z.infer<typeof ToHub>;
/** The first message of a peer. */
export type Hello = Extract<ToHub, { kind: "hello" }>;

/** Messages from the hub to a peer. */
export const ToRank = z.discriminatedUnion("kind", [
  z.strictObject({ kind: z.literal("nonce"), nonce: z.string().max(64) }),
  z.strictObject({ kind: z.literal("accepted") }),
  z.strictObject({ kind: z.literal("refused"), text, fix: text }),
  z.strictObject({ kind: z.literal("welcome") }),
  z.strictObject({ kind: z.literal("share"), name, members: z.array(rank) }),
  z.strictObject({ kind: z.literal("release"), name, problem: text.optional() }),
  z.strictObject({ kind: z.literal("abort"), text }),
  z.strictObject({ kind: z.literal("hold") }),
  z.strictObject({ kind: z.literal("last"), step: z.int() }),
  z.strictObject({ kind: z.literal("beat") }),
  z.strictObject({ kind: z.literal("bye") }),
]);
/** A value of the schema `ToRank`. */
export type ToRank = z.infer<typeof ToRank>;

/** "rnk1" */
const magic = 0x316b6e72;
const head = 12;
/**
 * Limits in bytes. Before the handshake, a client may send at most a hello (`stranger`) and a server at most a refusal (`greeting`). After
 * it, the largest message lists the ranks of a group (`member`).
 */
export const limits = {
  stranger: { message: 4096, data: 0 },
  greeting: { message: 2 ** 17, data: 0 },
  member: { message: 2 ** 20, data: 2 ** 20 },
};
/** Largest message and data of a frame, in bytes. */
export type Limit = (typeof limits)["member"];

/** Encodes a frame. */
export function frame(message: ToHub | ToRank, data: Uint8Array = new Uint8Array()): Uint8Array {
  const body = Buffer.from(JSON.stringify(message));
  const start = Buffer.alloc(head);
  start.writeUInt32LE(magic, 0);
  start.writeUInt32LE(body.length, 4);
  start.writeUInt32LE(data.length, 8);
  return Buffer.concat([start, body, data]);
}

/** A connection that sends and receives frames. */
export interface FramedConnection<Out> {
  readonly send: (message: Out, data?: Uint8Array) => void;
  /** Sets the limit of received frames. */
  readonly allow: (limit: Limit) => void;
  /** Closes the sending half and drops received data; the other side closes its half. */
  readonly close: () => void;
  /** Closes both halves after pending data is written. */
  readonly closeBoth: () => void;
}

/** Sends and receives frames over a socket. `received` receives each valid message. `ended` is called once, with a problem or, after a normal close, without one. */
export function framedConnection<In, Out extends ToHub | ToRank>(
  socket: Socket,
  schema: z.ZodType<In>,
  { limit, received, ended }: { limit: Limit; received: (message: In, data: Uint8Array) => void; ended: (problem?: string) => void },
): FramedConnection<Out> {
  let pending = Buffer.alloc(0);
  let allowed = limit;
  let over = false;
  const end = (problem?: string): void => {
    if (over) return;
    over = true;
    socket.destroy();
    ended(problem);
  };
  socket.setNoDelay(true);
  socket.on("data", (chunk) => {
    // drop data of a closed connection
    if (over) return;
    pending = pending.length === 0 ? chunk : Buffer.concat([pending, chunk]);
    while (!over && pending.length >= head) {
      if (pending.readUInt32LE(0) !== magic) return end("its data is not in rankc's protocol");
      const [message, data] = [pending.readUInt32LE(4), pending.readUInt32LE(8)];
      if (message > allowed.message || data > allowed.data) return end(`a message of ${message} + ${data} bytes is too long`);
      if (pending.length < head + message + data) return;
      const body = pending.subarray(head, head + message).toString("utf8");
      const carried = new Uint8Array(pending.subarray(head + message, head + message + data));
      pending = pending.subarray(head + message + data);
      const parsed = schema.safeParse(jsonOf(body));
      if (!parsed.success) return end("it sent an invalid message");
      received(parsed.data, carried);
    }
  });
  socket.on("error", (error: NodeJS.ErrnoException) => end(error.code ?? error.message));
  socket.on("close", () => end());
  return {
    send: (message, data) => void (socket.writable && socket.write(frame(message, data))),
    allow: (limit) => void (allowed = limit),
    close: () => {
      over = true;
      pending = Buffer.alloc(0);
      socket.end();
    },
    closeBoth: () => {
      over = true;
      pending = Buffer.alloc(0);
      socket.destroySoon();
    },
  };
}

function jsonOf(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Returns the handshake proof: HMAC-SHA-256 of the nonce with the token. */
export const proofOf = (token: string, nonce: string): string => createHmac("sha256", token).update(nonce).digest("hex");

/** Verifies a handshake proof in constant time. */
export function proves(proof: string, token: string, nonce: string): boolean {
  const [given, wanted] = [Buffer.from(proof), Buffer.from(proofOf(token, nonce))];
  return given.length === wanted.length && timingSafeEqual(given, wanted);
}
