/** When an instruction, or one launch of it, ran: what a runtime measures and a profile tells. Microseconds on the device's clock. */
export interface Timing {
  readonly rank: number;
  readonly stream: string;
  readonly id: string;
  readonly op: string;
  readonly begin_us: number;
  readonly end_us: number;
}
