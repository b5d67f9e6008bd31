/** The measured time of an instruction or of one launch, in microseconds of the device clock. */
export interface Timing {
  readonly rank: number;
  readonly stream: string;
  readonly id: string;
  readonly op: string;
  readonly begin_us: number;
  readonly end_us: number;
}
