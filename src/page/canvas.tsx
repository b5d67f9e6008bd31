/** A canvas with the size of its element in device pixels. It is drawn again when its size or a signal that the drawing reads changes. */
import { effect, useSignal } from "@preact/signals";
import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";

/** Where a drawing goes: sizes in CSS pixels. */
export interface Sheet {
  readonly context: CanvasRenderingContext2D;
  readonly width: number;
  readonly height: number;
  /** Device pixels of a CSS pixel. */
  readonly ratio: number;
}

/** The font of texts in canvases. */
const FONT = "12px system-ui, sans-serif";

interface CanvasProps extends Omit<JSX.IntrinsicElements["canvas"], "ref" | "width" | "height" | "label"> {
  /** Draws everything. Signals that it reads start the next drawing. */
  readonly draw: (sheet: Sheet) => void;
  /** What a screen reader says of it. */
  readonly label: string;
  /** Zooms or moves: a listener that may prevent the page from scrolling. */
  readonly onWheelActive?: (event: WheelEvent) => void;
}

/** A canvas that fills its element. */
export function Canvas({ draw, label, onWheelActive, ...rest }: CanvasProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const latest = useRef(draw);
  latest.current = draw;
  const size = useSignal({ width: 0, height: 0 });
  const drawn = useSignal(0);
  useEffect(() => {
    // after a rendering the drawing is another function, with other values in it
    drawn.value++;
  }, [draw, drawn]);
  useEffect(() => {
    const element = canvas.current;
    const context = element?.getContext("2d");
    if (!element || !context) return;
    const watch = new ResizeObserver(() => {
      const { width, height } = element.getBoundingClientRect();
      size.value = { width, height };
    });
    watch.observe(element);
    const stop = effect(() => {
      const { width, height } = size.value;
      drawn.value;
      const ratio = devicePixelRatio;
      if (width === 0 || height === 0) return;
      const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (element.width !== across) element.width = across;
      if (element.height !== down) element.height = down;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, width, height);
      context.font = FONT;
      latest.current({ context, width, height, ratio });
    });
    return () => {
      watch.disconnect();
      stop();
    };
  }, [size, drawn]);
  useEffect(() => {
    const element = canvas.current;
    if (!element || !onWheelActive) return;
    element.addEventListener("wheel", onWheelActive, { passive: false });
    return () => element.removeEventListener("wheel", onWheelActive);
  }, [onWheelActive]);
  return <canvas ref={canvas} role="img" aria-label={label} {...rest} />;
}

/** Returns where a pointer is on an element, in CSS pixels. */
export function pointOf(event: MouseEvent): { readonly x: number; readonly y: number } {
  const { left, top } = (event.currentTarget as Element).getBoundingClientRect();
  return { x: event.clientX - left, y: event.clientY - top };
}
