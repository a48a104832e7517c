// Server-sent events of a body, after the HTML standard's section 9.2.6, as far as the gateway uses them: `event` and `data`.

export interface ServerEvent {
  event: string
  data: unknown
}

export async function* parseEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerEvent> {
  const reader = body.getReader()
  const decoder = new TextDecoder()
  let rest = ''
  try {
    for (;;) {
      const { done, value } = await reader.read()
      if (done) return
      rest += decoder.decode(value, { stream: true })
      const frames = rest.split(/\r?\n\r?\n/)
      rest = frames.pop()!
      for (const frame of frames) {
        const event = parseFrame(frame)
        if (event) yield event
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined) // the stream may have failed already
  }
}

function parseFrame(frame: string): ServerEvent | null {
  let event = 'message'
  const data: string[] = []
  for (const line of frame.split(/\r?\n/)) {
    if (line.startsWith('event:')) event = line.slice(6).trim()
    else if (line.startsWith('data:')) data.push(line.slice(5).replace(/^ /, ''))
  }
  return data.length ? { event, data: JSON.parse(data.join('\n')) } : null
}
