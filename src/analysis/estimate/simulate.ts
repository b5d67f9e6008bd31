/**
 * Simulates a step of all stages. A block runs alone once and is then replayed; a stage starts a block when its messages are there. The step
 * block runs instruction by instruction, because collectives over all ranks and gradients of tied parameters tie the stages together.
 */

import { itemOf } from "../../../schemas/lookup.ts";
import type { BlockRun, Plan, Program } from "../../../schemas/plan.ts";
import { groupsOf } from "../../../schemas/program.ts";
import { invariant } from "../../ops/op.ts";
import { stagesOf } from "../stages.ts";
import { awaitCollectives, type BlockRunTimes, runBlock, runInstruction } from "./blockRun.ts";
import { type MemberTimes, memberTimesOf, pairedBlock } from "./pairedBlock.ts";
import { type PendingWork, StageClock } from "./stageClock.ts";
import { blockTimer, type CommunicationClass, type TimedBlock, type TimedInstruction, type TimingOptions } from "./timedBlocks.ts";
import { activities, PartSums, type TimeParts } from "./timeParts.ts";

/**
 * A block run with its times in seconds from the begin of the step. Of a pair the forward stands before the backward, with the time of the
 * pair in proportion to their kernels; their instructions alternate.
 */
export interface SimulatedRun {
  readonly run: BlockRun;
  readonly start: number;
  readonly end: number;
  readonly block: TimedBlock;
  /** When the clock of `times` began: with the block run, or with its pair. */
  readonly origin: number;
  readonly times: Pick<BlockRunTimes, "seconds" | "times">;
}

/** The simulated step of one stage. */
export interface SimulatedStage {
  readonly stage: number;
  readonly runs: readonly SimulatedRun[];
  /** The step block: its instructions, and their start and end. */
  readonly step: TimedBlock;
  readonly stepTimes: Float64Array;
  readonly parts: TimeParts;
  readonly blocks: readonly TimedBlock[];
}

/** A simulated step. */
export interface Simulation {
  readonly seconds: number;
  readonly stages: readonly SimulatedStage[];
}

/** What is simulated of a stage. Stages with equal blocks may share one list, whose messages then name the peers of another stage. */
export interface StageBlocks {
  readonly stage: number;
  readonly order: readonly BlockRun[];
  readonly blocks: readonly TimedBlock[];
  /** The instructions of the blocks, and the turns of pairs. */
  readonly program: Pick<Program, "chunks" | "pairs">;
  /** Returns the peer of this stage for a peer that the blocks name; default: that one. */
  readonly peerOf?: (named: number) => number;
}

/** A message on its way: when its sender was ready, and how long it travels. */
interface Message {
  readonly ready: number;
  readonly seconds: number;
}

/** The messages between stages, in the order of their sending. */
class Mail {
  readonly #sent = new Map<string, Message[]>();
  readonly #received = new Map<string, number>();

  send(from: number, to: number, channel: string, message: Message): void {
    const key = `${from} ${to} ${channel}`;
    const all = this.#sent.get(key);
    if (all) all.push(message);
    else this.#sent.set(key, [message]);
  }
  /** Returns the `ahead`-th message that is not received; undefined if it is not sent yet. */
  peek(from: number, to: number, channel: string, ahead = 0): Message | undefined {
    const key = `${from} ${to} ${channel}`;
    return this.#sent.get(key)?.[(this.#received.get(key) ?? 0) + ahead];
  }
  receive(from: number, to: number, channel: string): void {
    const key = `${from} ${to} ${channel}`;
    this.#received.set(key, (this.#received.get(key) ?? 0) + 1);
  }
}

/** A simulated block, and the times of the blocks that it consists of. */
interface Replay {
  readonly times: BlockRunTimes;
  readonly members: readonly MemberTimes[];
}
/** What stages with equal blocks share. */
class Simulated {
  /** The runs of each block that were simulated, by the communication that earlier blocks left. */
  readonly replays = new Map<TimedBlock, Map<string, Replay>>();
  /** The block of each pair, by its forward and its backward. */
  readonly pairs = new Map<TimedBlock, Map<TimedBlock, TimedBlock>>();
}

/** A stage while it is simulated. */
class StageRun {
  readonly stage: number;
  readonly #blocks: readonly TimedBlock[];
  /** The block runs, each alone or two that are paired. */
  readonly #groups: readonly (readonly BlockRun[])[];
  readonly #program: StageBlocks["program"];
  readonly #peerOf: (named: number) => number;
  /** The number of the last microbatch. */
  readonly #last: number;
  readonly #options: TimingOptions;
  readonly #mail: Mail;
  readonly #simulated: Simulated;
  /** How often each replay ran. */
  readonly #counts = new Map<BlockRunTimes, number>();
  readonly runs: SimulatedRun[] = [];
  readonly parts = new PartSums();
  /** Set when all block runs are over: the clock of the step block. */
  step: StepRun | undefined;
  /** How many groups have run. */
  #next = 0;
  #clock = 0;
  #pending: readonly PendingWork[] = [];

  constructor({ peerOf = (peer) => peer, order, ...own }: StageBlocks, options: TimingOptions, mail: Mail, simulated: Simulated) {
    [this.stage, this.#blocks, this.#program, this.#peerOf] = [own.stage, own.blocks, own.program, peerOf];
    [this.#options, this.#mail, this.#simulated] = [options, mail, simulated];
    this.#groups = groupsOf(order);
    this.#last = order.reduce((last, { microbatch }) => Math.max(last, microbatch), 0);
  }

  get blocks(): readonly TimedBlock[] {
    return this.#blocks;
  }

  /** Runs blocks until one lacks a message. Returns whether any ran. */
  advance(): boolean {
    const before = this.#next;
    for (let group = this.#groups[this.#next]; group; group = this.#groups[this.#next]) {
      if (!this.#start(group)) break;
      this.#next++;
    }
    if (this.#next === this.#groups.length && !this.step) {
      const block = this.#blocks.find(({ kind }) => kind === "step");
      invariant(block !== undefined, () => `stage ${this.stage} has no step block`);
      for (const [{ parts }, times] of this.#counts) this.parts.addAll(parts, times);
      const clock = new StageClock(this.parts, this.#clock, this.#pending);
      this.step = new StepRun({ stage: this.stage, peerOf: this.#peerOf, block, clock, mail: this.#mail });
      return true;
    }
    return this.#next > before;
  }

  /** Returns the block of a run; one without instructions takes no time. */
  #blockOf({ kind, chunk, microbatch }: BlockRun): TimedBlock {
    // those of the first and of the last microbatch stand before the others
    const found = this.#blocks.find(
      (b) => b.kind === kind && b.chunk === chunk && (!b.isFirst || microbatch === 0) && (!b.isLast || microbatch === this.#last),
    );
    return found ?? { kind, chunk, isFirst: false, isLast: false, instructions: [], launches: 0 };
  }

  /** Returns the block of a group of block runs: always the same object for the same blocks. */
  #groupOf(group: readonly BlockRun[], blocks: readonly TimedBlock[]): TimedBlock {
    const first = itemOf(blocks, 0, "block");
    const [, second] = blocks;
    if (!second) return first;
    const own = this.#simulated.pairs.get(first) ?? new Map<TimedBlock, TimedBlock>();
    this.#simulated.pairs.set(first, own);
    const known = own.get(second) ?? pairedBlock(this.#program, group, blocks);
    own.set(second, known);
    return known;
  }

  #start(group: readonly BlockRun[]): boolean {
    const blocks = group.map((run) => this.#blockOf(run));
    const block = this.#groupOf(group, blocks);
    const { times, members } = this.#replay(block, blocks);
    let [transfer, idle, travelling] = [0, 0, 0];
    const received = new Map<string, number>();
    for (const { kind, peer: named, channel, ready, seconds } of times.messages) {
      if (kind !== "recv") continue;
      const peer = this.#peerOf(named);
      const key = `${peer} ${channel}`;
      const ahead = received.get(key) ?? 0;
      received.set(key, ahead + 1);
      const message = this.#mail.peek(peer, this.stage, channel, ahead);
      if (!message) return false;
      const posted = this.#clock + ready;
      const leaves = this.#options.profile.overlap.prefetches_transfers ? message.ready : Math.max(message.ready, posted);
      const wait = Math.max(0, leaves + seconds - posted);
      const ofPeer = Math.min(wait, Math.max(0, message.ready - posted));
      travelling += seconds;
      // several messages of one block travel at once: the last decides
      if (wait > transfer + idle) [idle, transfer] = [ofPeer, wait - ofPeer];
    }
    const start = this.#clock + transfer + idle;
    for (const { kind, peer: named, channel, ready, seconds } of times.messages) {
      const peer = this.#peerOf(named);
      if (kind === "recv") this.#mail.receive(peer, this.stage, channel);
      else this.#mail.send(this.stage, peer, channel, { ready: start + ready, seconds });
    }
    const end = start + times.seconds;
    this.#counts.set(times, (this.#counts.get(times) ?? 0) + 1);
    const transfers = transfersOf(block);
    this.parts.addExposed("pp", transfer, transfers);
    if (transfers) this.parts.addHidden(transfers, activities.earlierBlocks, travelling - transfer);
    this.parts.bubble += idle;
    let from = start;
    for (const [n, run] of group.entries()) {
      const { share, times: own } = itemOf(members, n, "member");
      const to = n === group.length - 1 ? end : from + share * times.seconds;
      const common = { block: itemOf(blocks, n, "block"), origin: start, times: { seconds: times.seconds, times: own } };
      this.runs.push({ run, start: from, end: to, ...common });
      from = to;
    }
    this.#pending = times.tail.map((p) => ({ ...p, start: p.start + start, end: p.end + start }));
    this.#clock = end;
    return true;
  }

  /** Simulates a block, once for each state of the communication that earlier blocks left. */
  #replay(block: TimedBlock, blocks: readonly TimedBlock[]): Replay {
    const pending = this.#pending
      .filter(({ end }) => end > this.#clock)
      .map((p) => ({ ...p, start: p.start - this.#clock, end: p.end - this.#clock }));
    const own = this.#simulated.replays.get(block) ?? new Map<string, Replay>();
    this.#simulated.replays.set(block, own);
    const key = pending.map(({ stream, id, axes, end }) => `${stream}/${id}/${axes}/${end.toFixed(9)}`).join();
    const known = own.get(key);
    if (known) return known;
    const { assumed, profile } = this.#options;
    const { host_us, host_ahead_us = host_us } = profile.kernels;
    const hostSeconds = assumed?.captured ? 0 : 1e-6 * (assumed?.runsAhead ? host_ahead_us : host_us);
    const times = runBlock(block, pending, hostSeconds);
    const replay = { times, members: memberTimesOf(block, blocks, times) };
    own.set(key, replay);
    return replay;
  }
}

/** Returns the class of the transfers of a block. */
const transfersOf = ({ instructions }: TimedBlock): CommunicationClass | undefined =>
  instructions.find(({ instruction }) => instruction.kind === "recv")?.communication;

/** What the step block of a stage needs. */
interface StepParts extends Pick<StepRun, "block" | "clock"> {
  readonly stage: number;
  readonly peerOf: (named: number) => number;
  readonly mail: Mail;
}

/** The step block of a stage while it is simulated. */
class StepRun {
  readonly block: TimedBlock;
  readonly times: Float64Array;
  readonly clock: StageClock;
  readonly #stage: number;
  readonly #peerOf: (named: number) => number;
  readonly #mail: Mail;
  #next = 0;

  constructor({ stage, peerOf, block, clock, mail }: StepParts) {
    [this.#stage, this.#peerOf, this.block, this.clock, this.#mail] = [stage, peerOf, block, clock, mail];
    this.times = new Float64Array(2 * block.instructions.length);
  }

  get isOver(): boolean {
    return this.#next === this.block.instructions.length;
  }

  /** The collective over all ranks that this stage has reached, and when it could begin; undefined if it stands at none. */
  get meeting(): { readonly instruction: TimedInstruction; readonly ready: number } | undefined {
    const i = this.block.instructions[this.#next];
    if (i?.instruction.kind !== "collective" || !i.instruction.world) return undefined;
    return { instruction: i, ready: this.clock.readyAt(i, i.stream) };
  }

  /** Runs instructions until one needs other stages. Returns whether any ran. */
  advance(): boolean {
    const before = this.#next;
    for (let i = this.block.instructions[this.#next]; i; i = this.block.instructions[this.#next]) {
      awaitCollectives(this.clock, i);
      if (this.meeting) break;
      if (i.instruction.kind === "recv") {
        if (!this.#receive(i)) break;
      } else
        this.#done(
          runInstruction(this.clock, i, ({ peer, channel, ready, seconds }) =>
            this.#mail.send(this.#stage, this.#peerOf(peer), channel, { ready, seconds }),
          ),
        );
    }
    return this.#next > before;
  }

  /** Begins the collective over all ranks at a time that all stages have reached. */
  meet(start: number): void {
    const here = this.meeting;
    invariant(here !== undefined, "a stage meets others without a collective");
    const { instruction: i, ready } = here;
    const end = start + i.seconds;
    if (i.seconds > 0 || start > ready) this.clock.add({ ...i, axes: i.axes ?? "", start: ready, end, late: start - ready });
    this.#done([start, end]);
  }

  #receive(i: TimedInstruction): boolean {
    const { instruction } = i;
    if (instruction.kind !== "recv") return false;
    const peer = this.#peerOf(instruction.peer);
    const message = this.#mail.peek(peer, this.#stage, instruction.channel);
    if (!message) return false;
    this.#mail.receive(peer, this.#stage, instruction.channel);
    const ready = this.clock.readyAt(i, i.stream);
    const start = Math.max(ready, message.ready);
    this.clock.add({ ...i, axes: "pp", start, end: start + i.seconds, late: start - ready });
    this.#done([start, start + i.seconds]);
    return true;
  }

  #done([start, end]: readonly [number, number]): void {
    this.times[2 * this.#next] = start;
    this.times[2 * this.#next + 1] = end;
    this.#next++;
  }
}

/** Simulates a step of a plan. `timer` times the blocks of a stage. */
export const simulate = (plan: Plan, options: TimingOptions, timer = blockTimer(plan, options)): Simulation =>
  simulateStages(
    stagesOf(plan).map(({ program, memory }) => ({ stage: program.stage, order: program.order, blocks: timer(program, memory), program })),
    options,
  );

/** Simulates a step of stages. Throws an invariant if they wait for each other for ever: `verify` excludes such plans. */
export function simulateStages(stages: readonly StageBlocks[], options: TimingOptions): Simulation {
  const mail = new Mail();
  const simulated = new Simulated();
  const all = stages.map((stage) => new StageRun(stage, options, mail, simulated));
  for (let moved = true; moved; ) {
    moved = false;
    for (const stage of all) moved = (stage.step ? stage.step.advance() : stage.advance()) || moved;
    const meetings = all.map(({ step }) => step?.meeting);
    if (!moved && meetings.every((m) => m !== undefined)) {
      const start = Math.max(...meetings.map((m) => m?.ready ?? 0));
      for (const { step } of all) step?.meet(start);
      moved = true;
    }
  }
  const steps = all.map(({ step, stage }) => {
    invariant(step?.isOver === true, () => `stage ${stage} waits for ever in the estimate`);
    step.clock.join();
    return step;
  });
  const seconds = Math.max(...steps.map(({ clock }) => clock.compute));
  return {
    seconds,
    stages: all.map(({ stage, runs, parts, blocks }, s) => {
      const { clock, block, times } = itemOf(steps, s, "step of stage");
      parts.bubble += seconds - clock.compute;
      return { stage, runs, step: block, stepTimes: times, parts, blocks };
    }),
  };
}
