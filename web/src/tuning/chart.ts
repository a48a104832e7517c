// Loss over steps, as paths of an SVG.
import type { Point } from '../lib/types.ts'

export interface Scale {
  x: (step: number) => number
  y: (loss: number) => number
  steps: number[] // where to write numbers
  losses: number[]
}

/** Scales for a drawing of `width` by `height` that shows all of `points`. Raises nothing for none. */
export function scale(points: readonly Point[], width: number, height: number): Scale {
  const steps = points.map(({ step }) => step)
  const losses = points.map(({ loss }) => loss).filter(Number.isFinite)
  const [first, last] = [Math.min(...steps, 0), Math.max(...steps, 1)]
  const least = losses.length ? Math.min(...losses) : 0
  const most = losses.length ? Math.max(...losses) : 1
  const unit = step(Math.max(most - least, 0.1) / 4)
  const [low, high] = [Math.floor(least / unit) * unit, Math.ceil(most / unit) * unit]
  const top = high > low ? high : low + unit
  return {
    x: (at) => ((at - first) / (last - first)) * width,
    y: (loss) => height - ((loss - low) / (top - low)) * height,
    steps: ticks(first, last, step((last - first) / 4)),
    losses: ticks(low, top, unit),
  }
}

/** The round number (1, 2 or 5 times a power of ten) that is next above `rough`. */
export function step(rough: number): number {
  const power = 10 ** Math.floor(Math.log10(rough))
  return power * ([1, 2, 5].find((factor) => factor * power >= rough * 0.999) ?? 10)
}

function ticks(from: number, to: number, unit: number): number[] {
  const result = []
  for (let index = Math.ceil(from / unit - 1e-9); index * unit <= to + unit * 1e-9; index++) result.push(Number((index * unit).toPrecision(10)))
  return result
}

/** A line through points; those without a finite loss break it. */
export function line(points: readonly Point[], { x, y }: Scale): string {
  let pen = 'M'
  let path = ''
  for (const { step: at, loss } of points) {
    if (!Number.isFinite(loss)) pen = 'M'
    else {
      path += `${pen}${x(at).toFixed(1)} ${y(loss).toFixed(1)}`
      pen = 'L'
    }
  }
  return path
}
