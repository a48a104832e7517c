import assert from 'node:assert/strict'
import { test } from 'node:test'
import { asCurl, asPython, completionBody, compose } from './compose.ts'

const labels = { input: 'Q:', output: 'A:' }

test('text without examples stays as it is', () => {
  assert.equal(compose([{ input: 'only half', output: ' ' }], labels, ' Once '), ' Once ')
})

test('examples stand before the text, which waits for its answer', () => {
  assert.equal(compose([{ input: '2+2', output: '4' }], labels, '3+3'), 'Q: 2+2\nA: 4\n\nQ: 3+3\nA:')
})

test('settings get the names that /v1/completions has', () => {
  const settings = { max_tokens_to_generate: 5, do_sample: false, temperature: 0.7, top_k: null, top_logprobs: 0, stop_sequences: [], seed: 3 }
  assert.deepEqual(completionBody('m', 'p', settings), { model: 'm', prompt: 'p', max_tokens: 5, temperature: 0, seed: 3 })
  const sampled = completionBody('m', 'p', { do_sample: true, temperature: 0.7, top_k: 4, stop_sequences: ['\n'] })
  assert.deepEqual(sampled, { model: 'm', prompt: 'p', temperature: 0.7, top_k: 4, stop: ['\n'] })
})

test("quotes survive the shell's and Python's reading", () => {
  const body = completionBody('m', `it's "so"\n`, { top_k: 2 })
  assert.ok(asCurl('http://h', body, false).includes(`it'\\''s \\"so\\"\\n`))
  const python = asPython('http://h', body, true)
  assert.ok(python.includes(`prompt="it's \\"so\\"\\n"`) && python.includes('extra_body={"top_k": 2}') && python.includes('os.environ'))
})
