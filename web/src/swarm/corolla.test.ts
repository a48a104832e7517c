import assert from 'node:assert/strict'
import { test } from 'node:test'
import { petal, rings } from './corolla.ts'

test('spans side by side share a ring, copies do not', () => {
  assert.deepEqual(rings([{ start: 0, end: 15 }, { start: 15, end: 30 }]), [0, 0])
  assert.deepEqual(rings([{ start: 15, end: 30 }, { start: 0, end: 30 }, { start: 0, end: 15 }]), [1, 0, 1])
  assert.deepEqual(rings([]), [])
})

test('a petal is drawn for one block as for a hundred', () => {
  for (const count of [1, 2, 30, 100]) assert.match(petal(count - 1, count, 40, 100), /^M[-\d. LCZ]+Z$/)
})
