/** The server of rank 0: it listens, verifies the token of each connection, and gives connections that prove it to the coordinator. */
import { randomBytes } from "node:crypto";
import { createServer, type Socket } from "node:net";
import { Trouble } from "../../schemas/trouble.ts";
import { type Cancel, type Clock, systemClock } from "./clock.ts";
import { Coordinator, type CoordinatorSettings, type Peer } from "./coordinator.ts";
import { isLoopback } from "./rankPlace.ts";
import { type FramedConnection, framedConnection, type Hello, limits, proves, ToHub, type ToRank } from "./wire.ts";

/** Settings of the hub. */
export interface HubSettings extends CoordinatorSettings {
  /** The secret that all ranks of the run share. */
  readonly token: string;
}

/** A listening hub. */
export interface Hub {
  readonly close: () => void;
}

/** Opens the hub; resolves when it listens. Throws a Trouble if the port is not available. */
export async function openHub(settings: HubSettings, clock: Clock = systemClock): Promise<Hub> {
  const strangers = new Strangers(settings.world);
  const server = createServer();
  await listen(server, settings);
  const coordinator = new Coordinator(settings, clock, strangers.rejected);
  server.on("connection", (socket) => new HubConnection(socket, settings.token, coordinator, strangers, clock));
  return {
    close: () => {
      coordinator.close();
      server.close();
      strangers.destroyAll();
    },
  };
}

/** Connections before the handshake, and why such connections were closed. */
class Strangers {
  /** Reasons, and how often each closed a connection; at most 20 different ones. */
  readonly rejected = new Map<string, number>();
  /** Remote addresses; the oldest connection first. */
  readonly #sockets = new Map<Socket, string>();
  /** The limit of connections per address: all ranks may be on one host and connect simultaneously. */
  readonly #limit: number;

  constructor(world: number) {
    this.#limit = Math.max(64, world);
  }

  /**
   * Adds a connection, and closes the oldest ones if there are too many. A handshake takes one round trip, so peers can connect during
   * a flood; a peer that is closed retries.
   */
  add(socket: Socket, from: string): void {
    const ofAddress = [...this.#sockets].filter(([, address]) => address === from).map(([other]) => other);
    const surplus = [
      ...ofAddress.slice(0, Math.max(0, ofAddress.length + 1 - this.#limit)),
      ...[...this.#sockets.keys()].slice(0, Math.max(0, this.#sockets.size + 1 - 4 * this.#limit)),
    ];
    for (const other of surplus) {
      this.delete(other);
      other.destroy();
    }
    this.#sockets.set(socket, from);
  }

  delete(socket: Socket): void {
    this.#sockets.delete(socket);
  }

  reject(why: string, from: string): void {
    const reason = `${why} (from ${from})`;
    if (this.rejected.size < 20 || this.rejected.has(reason)) this.rejected.set(reason, (this.rejected.get(reason) ?? 0) + 1);
  }

  destroyAll(): void {
    for (const socket of this.#sockets.keys()) socket.destroy();
  }
}

/** One connection: the handshake first, then the messages of the peer. */
class HubConnection {
  readonly #socket: Socket;
  readonly #token: string;
  readonly #coordinator: Coordinator;
  readonly #strangers: Strangers;
  readonly #nonce = randomBytes(16).toString("hex");
  readonly #from: string;
  readonly #cancelTimeout: Cancel;
  readonly #line: FramedConnection<ToRank>;
  #peer: Peer | undefined;

  constructor(socket: Socket, token: string, coordinator: Coordinator, strangers: Strangers, clock: Clock) {
    this.#socket = socket;
    this.#token = token;
    this.#coordinator = coordinator;
    this.#strangers = strangers;
    this.#from = socket.remoteAddress ?? "an unknown address";
    strangers.add(socket, this.#from);
    this.#cancelTimeout = clock.after(HANDSHAKE, () => socket.destroy());
    socket.once("close", () => this.#endHandshake());
    this.#line = framedConnection<ToHub, ToRank>(socket, ToHub, {
      limit: limits.stranger,
      ended: (problem) => this.#ended(problem),
      received: (message, data) => this.#receive(message, data),
    });
    this.#line.send({ kind: "nonce", nonce: this.#nonce });
  }

  #receive(message: ToHub, data: Uint8Array): void {
    if (this.#peer) this.#coordinator.receive(this.#peer, message, data);
    else if (message.kind === "hello") this.#prove(message);
    else this.#socket.destroy();
  }

  #prove(hello: Hello): void {
    if (!proves(hello.proof, this.#token, this.#nonce)) {
      this.#strangers.reject("its token is not that of this run", this.#from);
      this.#line.send({ kind: "refused", ...otherToken });
      this.#line.closeBoth();
      return;
    }
    this.#endHandshake();
    this.#line.allow(limits.member);
    this.#peer = this.#coordinator.admit(hello, this.#line);
  }

  #ended(problem: string | undefined): void {
    if (this.#peer) this.#coordinator.peerLost(this.#peer, problem);
    else if (problem) this.#strangers.reject(problem, this.#from);
  }

  #endHandshake(): void {
    this.#cancelTimeout();
    this.#strangers.delete(this.#socket);
  }
}

/** The handshake timeout in milliseconds. */
const HANDSHAKE = 10_000;
const otherToken = {
  text: "the rank 0 there belongs to another run: it has another token",
  fix: "set MASTER_PORT, and the same RANKC_TOKEN on all ranks",
};

/** Listens on all addresses, because a host may resolve its own name to an address that others cannot reach; on loopback if the address is loopback. */
function listen(server: ReturnType<typeof createServer>, { address, port }: HubSettings): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", ({ code }: NodeJS.ErrnoException) => {
      const found = code === "EADDRINUSE" ? "another program listens there" : code;
      reject(
        new Trouble(`rank 0 cannot listen on port ${port}: ${found}`, "set MASTER_PORT (or RANKC_PORT) to a free port, equal on all ranks"),
      );
    });
    server.listen({ port, backlog: 4096, ...(isLoopback(address) && { host: address }) }, resolve);
  });
}
