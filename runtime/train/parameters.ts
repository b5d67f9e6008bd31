/** The parameters of a run: initial weights, weights of a checkpoint, and whole tensors from the shards of all ranks. */
import type { Buffer, Parameter, Plan } from "../../schemas/plan.ts";
import { printable } from "../../schemas/printable.ts";
import { elementsOf, numberInStage, rankAt } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { keyOf } from "../../src/ops/philox.ts";
import type { HostData, LocalRanks } from "../backend.ts";
import { checkpointState } from "../checkpoint/checkpointState.ts";
import type { RankPrograms, StageProgram } from "../rankPrograms.ts";
import { type Ranges, shardBox, shardOf, shardRanges, visitRuns } from "../shards.ts";

/** A whole tensor on the host. */
export interface Tensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}
/** Reads whole tensors by name. */
export interface WholeTensors {
  read(name: string, shape: readonly number[]): Float32Array;
}
/** Reads shards of the checkpoint state by name and ranges. */
export interface StateShards {
  shard(name: string, ranges: Ranges): Float32Array;
}

/** A shard of a tensor of the checkpoint state, and the buffers that hold it. */
export interface StateShard {
  readonly name: string;
  readonly buffers: readonly Buffer[];
  readonly ranges: Ranges;
}

/** Parameters on the local ranks. */
export class Parameters {
  readonly #plan: Plan;
  readonly #programs: RankPrograms;
  readonly #localRanks: LocalRanks;

  constructor(plan: Plan, programs: RankPrograms, localRanks: LocalRanks) {
    this.#plan = plan;
    this.#programs = programs;
    this.#localRanks = localRanks;
  }

  /** Returns the shards of a rank's parameters; the copies of equal sharding together. */
  shardsOf(
    rank: number,
  ): { readonly parameter: Parameter; readonly buffers: readonly Buffer[]; readonly sizes: readonly number[]; readonly ranges: Ranges }[] {
    return this.#programs.of(rank).program.parameters.flatMap((parameter) => {
      const shard = this.#programs.buffer(rank, parameter.buffer);
      const buffers = parameter.master === parameter.buffer ? [shard] : [shard, this.#programs.buffer(rank, parameter.master)];
      // a distributed optimizer shards the main copy further than the copy that kernels read
      const areEqual = buffers.every((b) => JSON.stringify(b.shardedBy) === JSON.stringify(shard.shardedBy));
      const groups = areEqual ? [buffers] : buffers.map((b) => [b]);
      return groups.map((group) => {
        const [{ sizes } = shard] = group;
        return { parameter, buffers: group, sizes, ranges: this.#ranges(group[0] ?? shard, rank) };
      });
    });
  }

  /** Writes the initial weights of the job's seed. */
  initialize(): void {
    for (const rank of this.#localRanks.ranks) {
      const device = this.#localRanks.rankDevice(rank);
      for (const { parameter, buffers, sizes, ranges } of this.shardsOf(rank)) {
        const { name, init } = parameter;
        const value = init.type === "ones" ? 1 : 0;
        if (init.type === "normal")
          device.draw(buffers, { key: keyOf(this.#plan.job.train.seed, name), std: init.std, box: shardBox(sizes, ranges) });
        else for (const b of buffers) device.write(b, 0, new Float32Array(elementsOf(b.shape)).fill(value));
      }
    }
  }

  /** Writes the weights of a checkpoint. Writes one parameter after the other to all its ranks, so that one whole parameter at a time is in host memory. */
  load(checkpoint: WholeTensors): void {
    const all = new Map<string, { rank: number; parameter: Parameter }[]>();
    for (const rank of this.#localRanks.ranks)
      for (const parameter of this.#programs.of(rank).program.parameters)
        all.set(parameter.name, [...(all.get(parameter.name) ?? []), { rank, parameter }]);
    for (const [name, places] of all) {
      let whole: Float32Array | undefined;
      for (const { rank, parameter } of places)
        for (const id of new Set([parameter.buffer, parameter.master])) {
          const b = this.#programs.buffer(rank, id);
          whole ??= checkpoint.read(name, b.sizes);
          this.#localRanks.rankDevice(rank).write(b, 0, this.shardFor(whole, b, rank));
        }
    }
  }

  /** Returns the shards of the checkpoint state of a rank, with the buffers that hold each: tied copies and 16-bit copies of parameters, too. */
  stateOf(rank: number): StateShard[] {
    const { program } = this.#programs.of(rank);
    const buffers = new Map(checkpointState(program).map(({ name, buffer }) => [name, new Set([buffer.id])]));
    for (const { name, buffer, master } of program.parameters) buffers.set(name, new Set([buffer, master]));
    return [...buffers].flatMap(([name, ids]) => {
      // copies of one sharding are read once
      const bySharding = new Map<string, Buffer[]>();
      for (const b of [...ids].map((id) => this.#programs.buffer(rank, id))) {
        const sharding = JSON.stringify(b.shardedBy);
        bySharding.set(sharding, [...(bySharding.get(sharding) ?? []), b]);
      }
      return [...bySharding.values()].map((own) => ({ name, buffers: own, ranges: own.flatMap((b) => [this.#ranges(b, rank)])[0] ?? [] }));
    });
  }

  /** Writes the checkpoint state. */
  restore(state: StateShards): void {
    for (const rank of this.#localRanks.ranks)
      for (const { name, buffers, ranges } of this.stateOf(rank)) {
        const shard = state.shard(name, ranges);
        for (const b of buffers) this.#localRanks.rankDevice(rank).write(b, 0, shard);
      }
  }

  /** Returns a rank's shard of a value: of the whole, or the value itself if it has the size of a shard. */
  shardFor<T extends HostData>(value: T, b: Buffer, rank: number): T {
    return value.length === elementsOf(b.shape) ? value : shardOf(value, b, this.#ranges(b, rank));
  }

  /** Returns one whole tensor for each parameter that is `wanted`, from the buffers that `pick` names. Throws a Trouble unless all ranks are local. */
  async collect(pick: (p: Parameter) => string, wanted: (p: Parameter) => boolean = () => true): Promise<Map<string, Tensor>> {
    const { mesh, job } = this.#plan;
    if (this.#localRanks.ranks.length < mesh.world)
      throw new Trouble(
        `the ranks of ${printable(job.name)} run in ${mesh.world} processes, and no process has all values`,
        "run it with --backend cpu or webgpu, which hold all ranks in one process",
      );
    const all = new Map<string, Tensor>();
    for (const stage of this.#programs.stages)
      for (const p of stage.program.parameters) {
        if (p.tied_to || !wanted(p)) continue;
        const b = stage.buffer(pick(p));
        all.set(p.name, await this.assemble(stage, b, (rank) => this.#localRanks.rankDevice(rank).read(b, 0)));
      }
    return all;
  }

  /** Assembles a whole value from the shards of the ranks of one stage. */
  async assemble({ program: { stage } }: StageProgram, b: Buffer, shardOfRank: (rank: number) => Promise<HostData>): Promise<Tensor> {
    const { mesh } = this.#plan;
    const out = new Float32Array(elementsOf(b.sizes));
    for (let n = 0; n < mesh.per_stage; n++) {
      const rank = rankAt(mesh, stage, n);
      const shard = await shardOfRank(rank);
      visitRuns(b.sizes, this.#ranges(b, rank), (global, local, n) => out.set(shard.subarray(local, local + n), global));
    }
    return { shape: b.sizes, data: out };
  }

  #ranges(b: Buffer, rank: number): Ranges {
    return shardRanges(this.#plan.mesh, b, numberInStage(this.#plan.mesh, rank));
  }
}
