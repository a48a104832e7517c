import assert from 'node:assert/strict'
import { test } from 'node:test'
import { branch, newestLeaf, siblings } from './tree.ts'

// a - b - c - d
//   \ e - f   (another answer to a), g is a with another wording
const tree = [
  { id: 'a', parent: null },
  { id: 'b', parent: 'a' },
  { id: 'c', parent: 'b' },
  { id: 'd', parent: 'c' },
  { id: 'e', parent: 'a' },
  { id: 'f', parent: 'e' },
  { id: 'g', parent: null },
]
const ids = (messages: { id: string }[]): string => messages.map(({ id }) => id).join('')

test('a branch runs from the first message to its leaf', () => {
  assert.equal(ids(branch(tree, 'd')), 'abcd')
  assert.equal(ids(branch(tree, 'f')), 'aef')
  assert.equal(ids(branch(tree, null)) + ids(branch(tree, 'unknown')), '')
})

test('siblings are the messages under one parent', () => {
  assert.equal(ids(siblings(tree, tree[1]!)), 'be')
  assert.equal(ids(siblings(tree, tree[0]!)), 'ag')
})

test('switching to a branch goes to its newest end', () => {
  assert.equal(newestLeaf(tree, 'a'), 'f')
  assert.equal(newestLeaf(tree, 'b'), 'd')
  assert.equal(newestLeaf(tree, 'g'), 'g')
})

test('a ring ends', () => {
  const ring = [
    { id: 'x', parent: 'y' },
    { id: 'y', parent: 'x' },
  ]
  assert.equal(ids(branch(ring, 'x')), 'yx')
  assert.ok(newestLeaf(ring, 'x'))
})
