// The swarm as a flower: one petal a block, one ring a copy.

export interface Held {
  start: number
  end: number
}

/** A ring for each span, so that spans that overlap lie in different rings; as few rings as that takes. */
export function rings(spans: readonly Held[]): number[] {
  const ends: number[] = [] // of the last span in each ring
  const order = spans.map((_, index) => index).sort((a, b) => spans[a]!.start - spans[b]!.start || spans[b]!.end - spans[a]!.end)
  const result = new Array<number>(spans.length)
  for (const index of order) {
    const free = ends.findIndex((end) => end <= spans[index]!.start)
    const ring = free < 0 ? ends.length : free
    ends[ring] = spans[index]!.end
    result[index] = ring
  }
  return result
}

const point = (radius: number, angle: number): string => `${(radius * Math.sin(angle)).toFixed(2)} ${(-radius * Math.cos(angle)).toFixed(2)}`

/** The outline of petal `index` of `count`, between two radii, its outer end round. The first one begins at the top, clockwise. */
export function petal(index: number, count: number, inner: number, outer: number): string {
  const whole = (2 * Math.PI) / count
  const gap = Math.min(whole * 0.14, 0.035)
  const [from, to] = [index * whole + gap / 2, (index + 1) * whole - gap / 2]
  const shoulder = Math.max(inner + 1, outer - Math.min(outer * (to - from) * 0.55, (outer - inner) * 0.6))
  const [left, right] = [point(shoulder, from), point(shoulder, to)]
  return `M${point(inner, from)}L${left}C${point(outer, from)} ${point(outer, to)} ${right}L${point(inner, to)}Z`
}
