// What the whole page shares: where it is, who is logged in, what is served, and the short messages at its edge.
import { ApiError, get, whenLoginIsNeeded } from './api.ts'
import type { ServerState } from './types.ts'

export type View = 'chat' | 'playground' | 'swarm' | 'tuning'
export type Theme = 'system' | 'light' | 'dark'

export interface Route {
  view: View
  conversation: string | null
  prompt: string | null // a soft prompt that a new conversation begins with
}

function routeOf(location: Location): Route {
  const [, first = '', second = ''] = location.pathname.split('/')
  const prompt = new URLSearchParams(location.search).get('prompt')
  if (first === 'playground' || first === 'swarm' || first === 'tuning') return { view: first, conversation: null, prompt }
  return { view: 'chat', conversation: first === 'c' && second ? decodeURIComponent(second) : null, prompt }
}

function storedTheme(): Theme {
  const stored = localStorage.getItem('theme')
  return stored === 'light' || stored === 'dark' ? stored : 'system'
}

class App {
  state = $state<ServerState | null>(null)
  problem = $state<string | null>(null) // why `state` could not be had
  loginNeeded = $state(false)
  route = $state<Route>(routeOf(location))
  theme = $state<Theme>(storedTheme())
  narrow = $state(false) // a phone's width
  drawer = $state(false) // the list of conversations on a narrow screen
  toast = $state<{ text: string; bad: boolean } | null>(null)
  private toastTimer: ReturnType<typeof setTimeout> | undefined

  constructor() {
    window.addEventListener('popstate', () => (this.route = routeOf(location)))
    const phone = matchMedia('(max-width: 760px)')
    const measure = (): boolean => (this.narrow = phone.matches)
    phone.addEventListener('change', measure)
    measure()
    whenLoginIsNeeded(() => (this.loginNeeded = true))
  }

  async load(): Promise<void> {
    try {
      this.state = await get<ServerState>('state')
      this.loginNeeded = this.state.login === 'needed'
      this.problem = null
    } catch (error) {
      this.problem = said(error)
    }
  }

  go(path: string, { replace = false } = {}): void {
    if (path !== location.pathname + location.search) history[replace ? 'replaceState' : 'pushState'](null, '', path)
    this.route = routeOf(location)
    this.drawer = false
  }

  say(text: string, { bad = false } = {}): void {
    clearTimeout(this.toastTimer)
    this.toast = { text, bad }
    this.toastTimer = setTimeout(() => (this.toast = null), bad ? 8000 : 3500)
  }

  /** Run `work`; what goes wrong is said at the page's edge. */
  async trying<T>(work: Promise<T>): Promise<T | undefined> {
    try {
      return await work
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 401)) this.say(said(error), { bad: true })
      return undefined
    }
  }

  setTheme(theme: Theme): void {
    this.theme = theme
    localStorage.setItem('theme', theme)
  }
}

export function said(error: unknown): string {
  if (error instanceof ApiError && error.retryAfter) return `${error.message} (try again in ${Math.ceil(error.retryAfter)} s)`
  return error instanceof Error ? error.message : String(error)
}

export const app = new App()
