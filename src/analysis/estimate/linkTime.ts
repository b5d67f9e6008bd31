/**
 * The time of a collective or a transfer. Inside a node: the table of its kind, interpolated over logarithms of bytes; without a table a latency
 * per step and a bandwidth. Across nodes: rings that leave each node through the adapters of the group's members there, or an exchange in which
 * each rank sends through its own adapter. Groups that run at once share nothing: each uses the adapters of its own members.
 */
import type { CollectiveRates, DeviceProfile, HostLinks, NetworkLinks } from "../../../schemas/deviceProfile.ts";
import type { CollectiveKind } from "../../../schemas/plan.ts";
import type { GroupTopology } from "./topology.ts";

/** Returns how many times the largest buffer of a collective each rank sends, by ring algorithms. */
export function sentShare(how: CollectiveKind, n: number): number {
  if (n === 1) return 0;
  switch (how) {
    case "all_reduce":
    case "all_reduce_max":
      return (2 * (n - 1)) / n;
    case "shift":
      return 1;
    default:
      return (n - 1) / n;
  }
}

const isReduction = (how: CollectiveKind): boolean => how === "all_reduce" || how === "all_reduce_max";

/** The experts of a token, and how many rows the plan sends for it. */
export interface RowCopies {
  readonly experts: number;
  readonly rows: number;
}

/**
 * Returns the seconds of a collective. `bytes`: its largest buffer on a rank, as nccl-tests counts. `copies`: of an exchange of rows that are sent
 * once to each node.
 */
export function collectiveSeconds(
  links: DeviceProfile["links"],
  how: CollectiveKind,
  bytes: number,
  group: GroupTopology,
  copies?: RowCopies,
): number {
  const { ranks, nodes, perNode } = group;
  if (ranks === 1 || bytes === 0) return 0;
  if (nodes === 1) return hostSeconds(links.host, how, bytes, ranks);
  if (how === "all_to_all") return exchangeSeconds(links, bytes, group, copies);
  const { host, network } = links;
  const sent = bytes * sentShare(how, ranks);
  const ring = network.bandwidth * network.efficiency;
  if (how === "shift") return 1e-6 * (network.latency_us + network.step_us) + sent / ring;
  const outside = sent / (perNode * ring);
  // a ring or a tree passes through the GPUs of a node at the rate of its links
  const inside = perNode > 1 ? sent / rateInside(host, how) : 0;
  return stepSeconds(links, how, group) + Math.max(outside, inside);
}

/** Returns the bus bandwidth inside a node at large sizes, in bytes/s. */
function rateInside(host: HostLinks, how: CollectiveKind): number {
  const last = tableOf(host, how)?.at(-1)?.busbw.at(-1);
  return last ? 1e9 * last[1] : host.bandwidth * host.efficiency;
}

/** Returns the latency of a ring, or of a tree where that is shorter: one hop per node, and one per GPU of a node. */
function stepSeconds({ host, network }: DeviceProfile["links"], how: CollectiveKind, { ranks, nodes, perNode }: GroupTopology): number {
  const rounds = isReduction(how) ? 2 : 1;
  const ring = rounds * ((nodes - 1) * network.step_us + (ranks - nodes) * host.step_us);
  const tree = rounds * (Math.ceil(Math.log2(nodes)) * network.step_us + (perNode - 1) * host.step_us);
  return 1e-6 * (network.latency_us + (isReduction(how) ? Math.min(ring, tree) : ring));
}

/** Each rank sends its share for other nodes through its adapter, and the rest over the links of its node, at once. */
function exchangeSeconds(
  { host, network }: DeviceProfile["links"],
  bytes: number,
  { ranks, nodes, perNode }: GroupTopology,
  copies?: RowCopies,
): number {
  const peer = bytes / ranks;
  const ramp = peer / (peer + network.half_bytes);
  // of experts that are drawn evenly, so many nodes are distinct
  const distinct = copies === undefined ? 1 : (nodes * (1 - (1 - 1 / nodes) ** copies.experts)) / copies.rows;
  const outside =
    (distinct * peer * (ranks - perNode)) /
    (network.bandwidth * (copies === undefined ? exchangeEfficiency(network, nodes) * ramp : network.rows_efficiency));
  const inside = perNode > 1 ? hostSeconds(host, "all_to_all", peer * perNode, perNode) : 0;
  return 1e-6 * (network.latency_us + network.peer_us * (ranks - 1)) + Math.max(outside, inside);
}

/** Interpolates the efficiency of an exchange over the logarithm of nodes; it is constant outside of the table. */
function exchangeEfficiency({ exchange_efficiency: table }: Pick<NetworkLinks, "exchange_efficiency">, nodes: number): number {
  return interpolated(
    table.map(([n, e]) => [Math.log(n), e] as const),
    Math.log(nodes),
  );
}

/** Returns the seconds of a collective of `ranks` ranks of one node. */
function hostSeconds(host: HostLinks, how: CollectiveKind, bytes: number, ranks: number): number {
  const table = tableOf(host, how);
  if (!table) {
    const steps = (isReduction(how) ? 2 : 1) * (how === "shift" || how === "all_to_all" ? 1 : ranks - 1);
    return 1e-6 * (host.latency_us + steps * host.step_us) + (bytes * sentShare(how, ranks)) / (host.bandwidth * host.efficiency);
  }
  const points = table.map((rates) => [Math.log(rates.ranks), Math.log(tableSeconds(rates, how, bytes))] as const);
  const most = table.at(-1)?.ranks ?? ranks;
  // beyond the table, latency grows with the steps; the bandwidth stays that of the largest group
  const further = ranks > most ? 1e-6 * host.step_us * (ranks - most) : 0;
  const share = ranks > most ? sentShare(how, ranks) / sentShare(how, most) : 1;
  return further + share * Math.exp(interpolated(points, Math.log(Math.min(ranks, most))));
}

/** Returns the rates of a collective by ascending ranks; a maximum takes as long as a sum. */
const tableOf = ({ tables }: HostLinks, how: CollectiveKind): readonly CollectiveRates[] | undefined =>
  tables[how] ?? (how === "all_reduce_max" ? tables.all_reduce : undefined);

/** nccl-tests prints the time of its smallest message: 512 bytes. */
const SMALLEST = 512;

/** Interpolates the time of a table over the logarithm of bytes. Beyond its last entry the bandwidth stays. */
function tableSeconds({ ranks, latency_us, busbw }: CollectiveRates, how: CollectiveKind, bytes: number): number {
  const share = sentShare(how, ranks);
  const seconds = ([size, rate]: readonly [number, number]): number => (share * size) / (1e9 * rate);
  const last = busbw.at(-1);
  if (last && bytes >= last[0]) return seconds([bytes, last[1]]);
  const points = [[Math.log(SMALLEST), Math.log(1e-6 * latency_us)] as const];
  for (const point of busbw) points.push([Math.log(point[0]), Math.log(seconds(point))] as const);
  return Math.exp(interpolated(points, Math.log(bytes)));
}

/** Returns the seconds of a message from a rank to a rank of another stage. */
export function transferSeconds({ host, network }: DeviceProfile["links"], bytes: number, isAcross: boolean): number {
  const { bandwidth, efficiency, latency_us } = isAcross ? network : host;
  return 1e-6 * latency_us + bytes / (bandwidth * efficiency);
}

/** Interpolates between points of ascending x; constant outside. */
function interpolated(points: readonly (readonly [number, number])[], x: number): number {
  let before = points[0];
  for (const point of points) {
    if (point[0] >= x) {
      if (!before || point === before || point[0] === before[0]) return point[1];
      return before[1] + ((point[1] - before[1]) * (x - before[0])) / (point[0] - before[0]);
    }
    before = point;
  }
  return before?.[1] ?? 0;
}
