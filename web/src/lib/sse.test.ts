import assert from 'node:assert/strict'
import { test } from 'node:test'
import { parseEvents } from './sse.ts'

async function read(...pieces: (string | Uint8Array)[]): Promise<unknown[]> {
  const encoder = new TextEncoder()
  const body = new ReadableStream<Uint8Array>({
    start(controller) {
      for (const piece of pieces) controller.enqueue(typeof piece === 'string' ? encoder.encode(piece) : piece)
      controller.close()
    },
  })
  const events = []
  for await (const event of parseEvents(body)) events.push(event)
  return events
}

test('events cut anywhere are whole again, comments are no events', async () => {
  const whole = new TextEncoder().encode(': \n\nevent: delta\ndata: {"text": "ü"}\n\nevent: done\ndata: {}\n\n')
  for (let cut = 1; cut < whole.length; cut++) {
    assert.deepEqual(await read(whole.slice(0, cut), whole.slice(cut)), [
      { event: 'delta', data: { text: 'ü' } },
      { event: 'done', data: {} },
    ])
  }
})

test('an event without its end is not told', async () => {
  assert.deepEqual(await read('event: delta\ndata: {"te'), [])
})
