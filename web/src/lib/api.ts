// Requests to the gateway that served this page, and its event streams.
import { parseEvents, type ServerEvent } from './sse.ts'

/** An answer that is no success: `message` is the gateway's own sentence. */
export class ApiError extends Error {
  readonly status: number
  readonly retryAfter: number | null

  constructor(status: number, message: string, retryAfter: number | null = null) {
    super(message)
    this.status = status
    this.retryAfter = retryAfter
  }
}

let onLoginNeeded: () => void = () => {}

/** `callback` runs whenever the gateway wants a login. */
export function whenLoginIsNeeded(callback: () => void): void {
  onLoginNeeded = callback
}

async function send(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
  const init: RequestInit = { method, signal: signal ?? null, credentials: 'same-origin', redirect: 'error' }
  if (method !== 'GET') {
    init.headers = { 'Content-Type': 'application/json' }
    init.body = JSON.stringify(body ?? {})
  }
  let response: Response
  try {
    response = await fetch(`/api/ui/${path}`, init)
  } catch (error) {
    if (signal?.aborted) throw error
    throw new ApiError(0, 'The gateway cannot be reached; is it still running?')
  }
  if (response.ok) return response
  if (response.status === 401 && path !== 'login') onLoginNeeded()
  throw await problem(response)
}

async function problem(response: Response): Promise<ApiError> {
  const fallback = `The gateway answered with status ${response.status}.`
  const wait = Number(response.headers.get('Retry-After')) || null
  const content: unknown = await response.json().catch(() => null)
  const message = (content as { error?: { message?: unknown } } | null)?.error?.message
  return new ApiError(response.status, typeof message === 'string' ? message : fallback, wait)
}

async function request<T>(method: string, path: string, body?: unknown): Promise<T> {
  const response = await send(method, path, body)
  return (response.status === 204 ? undefined : await response.json()) as T
}

export const get = <T>(path: string): Promise<T> => request<T>('GET', path)
export const post = <T = void>(path: string, body?: unknown): Promise<T> => request<T>('POST', path, body)
export const patch = <T = void>(path: string, body: unknown): Promise<T> => request<T>('PATCH', path, body)
export const remove = (path: string): Promise<void> => request<void>('DELETE', path)

/** The events of one request, until the gateway or `signal` ends it. */
export async function* stream(method: 'GET' | 'POST', path: string, body: unknown, signal: AbortSignal): AsyncGenerator<ServerEvent> {
  const response = await send(method, path, body, signal)
  if (response.body) yield* parseEvents(response.body)
}

const LONGEST_WAIT = 8_000 // ms between two tries

/** The events of a GET stream that is opened again whenever it breaks, until `signal` ends it or `onEvent` returns true. */
export async function follow(path: string, onEvent: (event: ServerEvent) => boolean | void, signal: AbortSignal, onBroken?: () => void): Promise<void> {
  let wait = 500
  while (!signal.aborted) {
    try {
      for await (const event of stream('GET', path, undefined, signal)) {
        wait = 500
        if (onEvent(event)) return
      }
    } catch (error) {
      if (signal.aborted) return
      if (error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429) throw error
    }
    if (signal.aborted) return
    onBroken?.()
    await new Promise((resolve) => setTimeout(resolve, wait))
    wait = Math.min(wait * 2, LONGEST_WAIT)
  }
}
