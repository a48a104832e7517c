// The list of conversations: the latest first, searched, page by page.
import { app } from './app.svelte.ts'
import { get, patch, post, remove } from './api.ts'
import type { Conversation, ConversationSummary } from './types.ts'

interface Page {
  conversations: ConversationSummary[]
  next: string | null
}

class Conversations {
  list = $state<ConversationSummary[]>([])
  query = $state('')
  next = $state<string | null>(null)
  loaded = $state(false)
  private asked = 0

  async refresh(): Promise<void> {
    const asked = ++this.asked
    const page = await app.trying(get<Page>(`conversations?query=${encodeURIComponent(this.query)}&limit=50`))
    if (!page || asked !== this.asked) return // a later search has been sent
    this.list = page.conversations
    this.next = page.next
    this.loaded = true
  }

  /** Somebody asks something in this conversation: it stands first. The gateway is not asked for the list, as it has a question to answer. */
  moveUp(id: string, title: string, model: string | null): void {
    if (this.query) return // whether it is found, the gateway tells when the answer has ended
    const now = new Date().toISOString()
    const known = this.list.find((each) => each.id === id)
    this.list = [{ created: now, found: null, ...known, id, title, model, updated: now }, ...this.list.filter((each) => each !== known)]
  }

  async more(): Promise<void> {
    if (!this.next) return
    const page = await app.trying(get<Page>(`conversations?query=${encodeURIComponent(this.query)}&limit=50&before=${encodeURIComponent(this.next)}`))
    if (!page) return
    this.list.push(...page.conversations)
    this.next = page.next
  }

  async rename(id: string, title: string): Promise<void> {
    await patch(`conversations/${id}`, { title })
    await this.refresh()
  }

  async delete(id: string): Promise<void> {
    await remove(`conversations/${id}`)
    await this.refresh()
  }

  async import(file: File): Promise<Conversation> {
    let content: unknown
    try {
      content = JSON.parse(await file.text())
    } catch {
      throw new Error(`${file.name} is no exported conversation: it holds no JSON.`)
    }
    const conversation = await post<Conversation>('conversations/import', content)
    await this.refresh()
    return conversation
  }
}

export const conversations = new Conversations()
