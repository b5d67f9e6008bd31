/** What a run reports of a step, and of an evaluation. */
import type { HeldOutPart } from "./heldOut.ts";

/** The metrics of a step. */
export interface StepResult {
  /** 1-based. */
  readonly step: number;
  /** Mean cross-entropy of the labelled tokens, in nats; train.loss_weighting sets the weights; microbatches without labels are excluded. */
  readonly loss: number;
  /** Labelled tokens, if the job has data.labels. */
  readonly labels?: number;
  /** The loss of multi-token prediction, mean over the depths. The training loss includes model.mtp.coeff times it. */
  readonly mtp_loss?: number;
  /** The loss of each depth, if there are several. */
  readonly mtp_losses?: readonly number[];
  /** The sum of balancing and z losses; 0 if there are none. */
  readonly aux_loss: number;
  /** The z loss within aux_loss. */
  readonly z_loss?: number;
  /** Tokens of the busiest expert over the mean of its layer, before tokens are dropped; the maximum over layers. */
  readonly expert_load?: number;
  /** Tokens that chose each expert, by layer with experts; only of a detailed step. */
  readonly expert_loads?: readonly (readonly number[])[];
  /** The smallest and the largest bias of the experts' choice; only of a detailed step. */
  readonly expert_bias?: readonly [number, number];
  /** Rows dropped because of the capacity, summed over layers. */
  readonly dropped_rows?: number;
  /** With train.metrics: the mean entropy of the routers' scores, in nats. */
  readonly router_entropy?: number;
  /** Before clipping. */
  readonly grad_norm: number;
  /** With train.metrics: the norm of all weights after the step; only of a detailed step. */
  readonly parameter_norm?: number;
  readonly lr: number;
  readonly tokens: number;
  /** From the begin of the step, or from the end of the step before it if it was issued by then, to its end. */
  readonly seconds: number;
  /** An upper bound of the time that the devices of this process waited for the batch of the step. On the CPU all reading is waiting. */
  readonly data_wait_seconds: number;
  /** With data.documents.mask: the pairs of tokens in the documents over those of causal attention to whole sequences; only of a detailed step. */
  readonly attention_share?: number;
  /** Memory in use on the device of the first local rank, by all programs; only of a detailed step, and where the device says it. */
  readonly memory_bytes?: number;
  /** In fp16: the loss scale of the step. */
  readonly loss_scale?: number;
  /** In fp16 and with train.on_nonfinite skip: whether the step was skipped because of an overflow or a non-finite metric. */
  readonly skipped?: boolean;
  /** Of a skipped step: the non-finite metric, with `debugNonfinite` also its origin. Not set for fp16 overflows. */
  readonly nonfinite?: string;
}

/** The loss on some held-out tokens. */
export interface HeldOutLoss {
  /** Mean cross-entropy of the tokens, in nats; NaN without tokens. */
  readonly loss: number;
  /** e^loss. */
  readonly perplexity: number;
  /** Predicted tokens. */
  readonly tokens: number;
}
/** The result of an evaluation. */
export interface EvaluationResult extends HeldOutLoss {
  /** The steps that the model was trained for. */
  readonly step: number;
  readonly part: HeldOutPart;
  /** The same of each source. */
  readonly sources: readonly (HeldOutLoss & { readonly source: string })[];
  readonly seconds: number;
}
