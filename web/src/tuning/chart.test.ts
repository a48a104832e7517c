import assert from 'node:assert/strict'
import { test } from 'node:test'
import { line, scale, step } from './chart.ts'

test('numbers on the axes are round', () => {
  assert.deepEqual([0.03, 0.1, 0.4, 3, 60].map(step), [0.05, 0.1, 0.5, 5, 100])
  const { steps, losses } = scale([{ step: 1, loss: 3.7 }, { step: 100, loss: 2.89 }], 100, 50)
  assert.deepEqual(steps, [0, 50, 100])
  assert.deepEqual(losses, [2.5, 3, 3.5, 4])
})

test('all points lie inside, and a loss that is no number breaks the line', () => {
  const points = [{ step: 1, loss: 4 }, { step: 2, loss: Number.NaN }, { step: 3, loss: 2 }]
  const drawn = scale(points, 100, 50)
  for (const { step: at, loss } of [points[0]!, points[2]!]) {
    assert.ok(drawn.x(at) >= 0 && drawn.x(at) <= 100 && drawn.y(loss) >= 0 && drawn.y(loss) <= 50)
  }
  assert.equal(line(points, drawn).split('M').length, 3)
})

test('no points and one point are no error', () => {
  assert.equal(line([], scale([], 100, 50)), '')
  assert.match(line([{ step: 5, loss: 1 }], scale([{ step: 5, loss: 1 }], 100, 50)), /^M100\.0 /)
})
