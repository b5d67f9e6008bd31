/**
 * Opens one rank of a plan in this process: its rank from the environment, the rendezvous with the other ranks, and its GPU. A plan of one
 * rank needs no rendezvous.
 */

import type { Plan } from "../../schemas/plan.ts";
import { numberInStage } from "../../schemas/sharding.ts";
import { Trouble } from "../../schemas/trouble.ts";
import type { LocalRanks, RankDevice } from "../backend.ts";
import { type Env, ordinalOf, placeOf, type RankPlace } from "../launch/rankPlace.ts";
import { join, launcherOf, type Meeting, timesOf } from "../launch/rendezvous.ts";
import type { StartupClock } from "../startup.ts";
import { openCuda } from "./backend.ts";
import { driver } from "./driver.ts";
import type { KernelFiles } from "./kernels.ts";

/** Settings of `openRank`. */
export interface RankSettings {
  readonly files: KernelFiles;
  readonly env: Env;
  /** The version of rankc; equal on all ranks. */
  readonly version: string;
  readonly graph?: boolean;
  readonly profile?: boolean;
  readonly startup?: StartupClock;
  readonly onProgress?: (line: string) => void;
}

/** Opens the rank of this process. Throws a Trouble if the environment has no rank and the plan has more than one. */
export async function openRank(plan: Plan, { files, env, version, onProgress, ...how }: RankSettings): Promise<LocalRanks> {
  const { world } = plan.mesh;
  const place = placeOf(env, world);
  if (!place && world > 1)
    throw new Trouble(
      `the plan has ${world} ranks, and nothing says which of them this process is`,
      "start it with `rankc run`, torchrun, srun or mpirun",
    );
  const { devices } = driver();
  const device = place ? ordinalOf(place, devices.length) : 0;
  const over = new AbortController();
  const meeting = place && (await meet(plan, place, env, version, over));
  const rank = place?.rank ?? 0;
  const progress = rank === 0 && onProgress ? { onProgress } : {};
  try {
    const share = async (name: string, members: readonly number[], make: () => Uint8Array) =>
      meeting ? meeting.share(name, members, make) : make();
    const localRanks = await openCuda(plan, { rank, device, files, share, signal: over.signal, ...how, ...progress });
    return meeting ? together(plan, rank, localRanks, meeting) : localRanks;
  } catch (error) {
    await meeting?.fail((error as Error).message);
    throw error;
  }
}

const meet = ({ digests, mesh }: Plan, place: RankPlace, env: Env, version: string, over: AbortController): Promise<Meeting> =>
  join({
    ...{ rank: place.rank, world: mesh.world, address: place.address, port: place.port, token: place.token },
    ...{ plan: digests.plan, version, times: timesOf(env), ...launcherOf(env) },
    onAbort: (reason) => over.abort(reason),
  });

/** Returns the local rank with the functions that need the other processes. */
export function together({ mesh }: Plan, rank: number, localRanks: LocalRanks, meeting: Meeting): LocalRanks {
  let step = 0;
  const ranks = Array.from({ length: mesh.world }, (_, r) => r);
  const leaders = ranks.filter((r) => numberInStage(mesh, r) === 0);
  const { comm } = localRanks;
  const own = localRanks.rankDevice(rank);
  const backend: RankDevice = {
    zeroGradients: () => own.zeroGradients(),
    write: (buffer, copy, data) => own.write(buffer, copy, data),
    draw: (buffers, draw) => own.draw(buffers, draw),
    ...(own.openLoader && { openLoader: () => own.openLoader!() }),
    compute(i, copy, first) {
      meeting.report(i.id);
      own.compute(i, copy, first);
    },
    read(buffer, copy) {
      meeting.report(`reading ${buffer.id}`);
      return own.read(buffer, copy);
    },
    async copyOut(pieces, block) {
      meeting.report(`copying ${pieces[0]?.buffer.id} to the host`);
      await own.copyOut?.(pieces, block);
    },
    openStaging: (most, unit) => own.openStaging?.(most, unit),
  };
  return {
    ...localRanks,
    rankDevice: () => backend,
    comm: {
      collective(r, i, at) {
        meeting.report(`${i.id} (${i.name} over ${i.axes}), ${at.tag}`);
        return comm.collective(r, i, at);
      },
      wait: (r, id) => comm.wait(r, id),
      send(r, i, at) {
        meeting.report(`${i.id} to stage ${i.peer}, ${at.tag}`);
        comm.send(r, i, at);
      },
      recv(r, i, at) {
        meeting.report(`${i.id} from stage ${i.peer}, ${at.tag}`);
        return comm.recv(r, i, at);
      },
    },
    mayBegin: () => meeting.begin(++step),
    stop: () => meeting.stop(),
    async finish() {
      meeting.report("the end of the step");
      await localRanks.finish();
    },
    /** Sums the values of the first rank of each stage, in stage order. */
    async combine(values) {
      const all = new Float64Array(values.length);
      for (const leader of leaders) {
        const order = [leader, ...ranks.filter((r) => r !== leader)];
        const shared = await meeting.share(`numbers of rank ${leader}`, order, () => new Uint8Array(Float64Array.from(values).buffer));
        const theirs = new Float64Array(shared.slice().buffer);
        for (let i = 0; i < all.length; i++) all[i]! += theirs[i]!;
      }
      return [...all];
    },
    meet: (name, problem) => meeting.barrier(name, problem),
    report: (what) => meeting.report(what),
    async close(error) {
      // notify the others first: pending work of this device may depend on them
      if (error) await meeting.fail(error.message);
      await localRanks.close(error);
      if (!error) await meeting.close();
    },
  };
}
