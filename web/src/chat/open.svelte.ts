// The conversation that is open: its tree, the branch in view, and the answers that are being written into it.
import { app, said } from '../lib/app.svelte.ts'
import { conversations } from '../lib/conversations.svelte.ts'
import { follow, get, patch, post } from '../lib/api.ts'
import { branch, newestLeaf } from '../lib/tree.ts'
import type { Conversation, Manner, Message } from '../lib/types.ts'

interface Asked {
  user: Message
  answer: Message
}

interface Delta {
  text: string
  tokens: number
  tokens_per_second: number | null
  ttft: number | null
}

const FRESH: Manner = { model: null, system: null, template: null, prompt: null, settings: {} }

export class OpenConversation {
  id = $state<string | null>(null)
  title = $state('')
  manner = $state<Manner>({ ...FRESH })
  messages = $state<Message[]>([])
  leaf = $state<string | null>(null)
  loading = $state(false)
  missing = $state<string | null>(null) // why it cannot be shown
  sending = $state(false)
  waiting = $state<Record<string, number>>({}) // places in the queue, by answer
  path = $derived(branch(this.messages, this.leaf))
  writing = $derived(this.path.find((message) => message.state === 'writing') ?? null)
  private following = new Map<string, AbortController>()

  /** Show the conversation `id`, or a new one with the soft prompt `prompt`. */
  async open(id: string | null, prompt: string | null): Promise<void> {
    if (id !== null && id === this.id) return
    this.close()
    this.id = id
    if (id === null) {
      this.manner = { ...FRESH, prompt }
      return
    }
    this.loading = true
    try {
      const { messages, ...conversation } = await get<Conversation & { messages: Message[] }>(`conversations/${encodeURIComponent(id)}`)
      if (this.id !== id) return
      this.take(conversation)
      this.messages = messages
      this.leaf = conversation.leaf ?? messages.at(-1)?.id ?? null
      for (const message of messages) if (message.state === 'writing') this.follow(message.id)
    } catch (error) {
      if (this.id === id) this.missing = said(error)
    } finally {
      if (this.id === id) this.loading = false
    }
  }

  /** Look away; answers go on being written at the gateway. */
  close(): void {
    for (const controller of this.following.values()) controller.abort()
    this.following.clear()
    Object.assign(this, { id: null, title: '', messages: [], leaf: null, loading: false, missing: null, waiting: {} })
  }

  /** Ask at the end of the branch, or under `parent` for another branch. Tells whether the question was taken. */
  async ask(text: string, parent?: string | null): Promise<boolean> {
    if (this.sending) return false
    this.sending = true
    try {
      const { user, answer } = this.id === null ? await this.begin(text) : await post<Asked>(`conversations/${this.id}/messages`, { text, parent: parent === undefined ? this.leaf : parent })
      this.messages.push(user, answer)
      this.leaf = answer.id
      this.title ||= text.slice(0, 60)
      this.follow(answer.id)
      if (this.id !== null) conversations.moveUp(this.id, this.title, this.manner.model)
      return true
    } catch (error) {
      app.say(said(error), { bad: true })
      return false
    } finally {
      this.sending = false
    }
  }

  async regenerate(message: Message): Promise<void> {
    const taken = await app.trying(post<{ answer: Message }>(`messages/${message.id}/regenerate`))
    if (!taken) return
    this.messages.push(taken.answer)
    this.leaf = taken.answer.id
    this.follow(taken.answer.id)
  }

  /** Let an answer that was cut short go on. */
  async resume(message: Message): Promise<void> {
    const taken = await app.trying(post<{ answer: Message }>(`messages/${message.id}/resume`))
    if (!taken) return
    this.replace(taken.answer)
    this.follow(taken.answer.id)
  }

  async stop(): Promise<void> {
    if (this.writing) await app.trying(post(`messages/${this.writing.id}/stop`))
  }

  /** Look at the branch through `message`. */
  async choose(message: Message): Promise<void> {
    this.leaf = newestLeaf(this.messages, message.id)
    if (this.id !== null) await app.trying(patch(`conversations/${this.id}`, { leaf: this.leaf }))
  }

  /** Change what the conversation is held with from the next question on. */
  async change(manner: Partial<Manner>): Promise<void> {
    if (this.id !== null && (await app.trying(patch<Conversation>(`conversations/${this.id}`, manner))) === undefined) return
    Object.assign(this.manner, manner)
  }

  async rename(title: string): Promise<void> {
    if (this.id === null || !title.trim()) return
    await app.trying(conversations.rename(this.id, title.trim()))
    this.title = title.trim()
  }

  private async begin(text: string): Promise<Asked> {
    const { user, answer, ...conversation } = await post<Conversation & Asked>('conversations', { ...$state.snapshot(this.manner), text })
    this.id = conversation.id
    this.take(conversation)
    app.go(`/c/${conversation.id}`, { replace: true })
    return { user, answer }
  }

  private take(conversation: Conversation): void {
    const { title, model, system, template, prompt, settings } = conversation
    this.title = title
    this.manner = { model, system, template, prompt, settings }
  }

  private replace(message: Message): void {
    const index = this.messages.findIndex(({ id }) => id === message.id)
    if (index >= 0) this.messages[index] = message
  }

  private follow(id: string): void {
    this.following.get(id)?.abort()
    const controller = new AbortController()
    this.following.set(id, controller)
    const frame = new Frame((delta) => this.append(id, delta))
    const finished = follow(
      `messages/${id}/events`,
      ({ event, data }) => {
        if (event === 'delta') frame.add(data as Delta)
        else if (event === 'snapshot') {
          frame.drop()
          const { text, tokens } = data as { text: string; tokens: number }
          const message = this.find(id)
          if (message) Object.assign(message, { text, stats: { ttft: null, tokens_per_second: null, ...message.stats, tokens } })
        } else if (event === 'waiting') this.waiting[id] = (data as { position: number }).position
        else if (event === 'notice') this.find(id)?.notices.push((data as { text: string }).text)
        else if (event === 'done') {
          frame.drop()
          delete this.waiting[id]
          this.replace((data as { message: Message }).message)
          void conversations.refresh()
          return true
        }
        return false
      },
      controller.signal,
    )
    finished.catch((error: unknown) => app.say(said(error), { bad: true })).finally(() => this.following.delete(id))
  }

  private find(id: string): Message | undefined {
    return this.messages.find((message) => message.id === id)
  }

  private append(id: string, { text, tokens, tokens_per_second, ttft }: Delta): void {
    const message = this.find(id)
    if (!message) return
    delete this.waiting[id]
    message.text += text
    message.stats = { tokens, tokens_per_second, ttft }
  }
}

/** Deltas gathered for one animation frame: the page is drawn once for all of them. The first is shown as it comes. */
class Frame {
  private pending: Delta | null = null
  private begun = false
  private requested = 0
  private readonly show: (delta: Delta) => void

  constructor(show: (delta: Delta) => void) {
    this.show = show
  }

  add(delta: Delta): void {
    if (!this.begun) {
      this.begun = true
      this.show(delta)
      return
    }
    this.pending = { ...delta, text: (this.pending?.text ?? '') + delta.text }
    // A page in the background gets no frames; its text waits here until it is looked at.
    this.requested ||= requestAnimationFrame(() => {
      this.requested = 0
      const pending = this.pending
      this.pending = null
      if (pending) this.show(pending)
    })
  }

  drop(): void {
    this.pending = null
  }
}
