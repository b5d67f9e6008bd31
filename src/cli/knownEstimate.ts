/** Estimates of plans that an earlier command of this build made. */
import { sha256 } from "../plan/seal.ts";
import { type EstimateView, estimateView } from "../report/estimateView.ts";
import { recall, remember } from "./cache.ts";
import { cacheFolder } from "./cacheFolder.ts";

/** Returns the estimate of a plan by a profile, as `estimateView` does. An estimate takes longer than all else of a report of a known plan, so it is kept. */
export const knownEstimate: typeof estimateView = (plan, profile, imbalance = 1) => {
  if (!profile || cacheFolder() === undefined) return estimateView(plan, profile, imbalance);
  const name = `estimate-${sha256(JSON.stringify([plan.digests.plan, profile, imbalance])).slice(0, 32)}`;
  const found = recall(name);
  if (typeof found === "object" && found !== null && "seconds" in found) return found as EstimateView;
  const view = estimateView(plan, profile, imbalance);
  remember(name, view);
  return view;
};
