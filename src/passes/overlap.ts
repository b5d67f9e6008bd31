/**
 * Overlap: collectives that run beside compute. It runs after lowering and fusion, on programs whose collectives run in order, and makes
 * some of them asynchronous: the job's keys say which. `verifyStreams` proves that no value depends on how long they take.
 */
import type { Job } from "../../schemas/job.ts";
import type { Program } from "../../schemas/plan.ts";
import type { Mesh } from "./mesh.ts";
import { overlapExperts } from "./overlap/expertOverlap.ts";
import { bucketGradients } from "./overlap/gradientBuckets.ts";
import { interleave } from "./overlap/interleave.ts";
import { bucketParameters } from "./overlap/parameterBuckets.ts";
import { gatherInForward } from "./overlap/parameterGather.ts";
import { overlapTensor } from "./overlap/tensorOverlap.ts";
import { splitProducts } from "./overlap/tensorParts.ts";
import { streamsOf } from "./verifyStreams.ts";

const MIB = 1 << 20;

/** Returns the programs with the asynchronous collectives that the job asks for. */
export function overlap(job: Pick<Job, "parallel" | "train" | "cluster">, mesh: Mesh, programs: Program[]): Program[] {
  const { gradient_bucket, parameter_bucket, parameter_gather, expert_overlap, tensor_overlap, communication_sms } = job.parallel;
  const reserved = communication_sms === "none" ? {} : { multiprocessors: communication_sms };
  // experts first, which move more bytes; buckets last: they close where gradients are complete in the order that the others leave
  const passes: ((p: Program) => Program)[] = [
    ...(expert_overlap === "none" ? [] : [(p: Program) => overlapExperts(p, mesh, expert_overlap === "interleave")]),
    ...(typeof tensor_overlap === "string" ? [] : [(p: Program) => splitProducts(p, mesh, tensor_overlap)]),
    ...(tensor_overlap === "none" ? [] : [(p: Program) => overlapTensor(p, mesh)]),
    ...(gradient_bucket === "none" ? [] : [(p: Program) => bucketGradients(p, gradient_bucket * MIB)]),
    ...(parameter_bucket === "none" || parameter_gather === "step" ? [] : [(p: Program) => gatherInForward(p, parameter_bucket * MIB)]),
    ...(parameter_bucket === "none" ? [] : [(p: Program) => bucketParameters(p, parameter_bucket * MIB)]),
    // last: it counts the instructions of blocks
    ...(expert_overlap === "interleave" ? [(p: Program) => interleave(p, job, mesh)] : []),
  ];
  if (passes.length === 0) return programs;
  return programs.map((program) => {
    const changed = passes.reduce((p, pass) => pass(p), program);
    const streams = streamsOf(changed);
    return streams ? { ...changed, streams: streams.map((use) => ({ ...use, ...reserved })) } : changed;
  });
}
